//! The few raw calls of Node-API that the runtime is made of: what the bindings have no cheap form of.

use std::cell::OnceCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::{self, NonNull};
use std::rc::Rc;

use napi::bindgen_prelude::{Env, Unknown};
use napi::{Error, JsValue, Result, sys};

use crate::runtime::Runtime;

fn check(status: sys::napi_status, call: &str) -> Result<()> {
    match status {
        sys::Status::napi_ok => Ok(()),
        status => Err(Error::from_reason(format!("{call} returned {status}"))),
    }
}

/// The runtime of the environment, if it is started.
pub(crate) fn instance(env: &Env) -> Result<Option<&Runtime>> {
    let mut data: *mut c_void = ptr::null_mut();
    // SAFETY: called on the environment's thread.
    check(unsafe { sys::napi_get_instance_data(env.raw(), &mut data) }, "napi_get_instance_data")?;
    // SAFETY: the slot is this addon's own; only `set_instance` fills it, with an `Rc<Runtime>` in a box that lives
    // as long as the environment.
    Ok(unsafe { data.cast::<Rc<Runtime>>().as_ref() }.map(Rc::as_ref))
}

/// Makes `runtime` the environment's.
pub(crate) fn set_instance(env: &Env, runtime: Rc<Runtime>) -> Result<()> {
    unsafe extern "C" fn free(_env: sys::napi_env, data: *mut c_void, _hint: *mut c_void) {
        // SAFETY: `data` is the box below; the environment calls this once, at its end.
        drop(unsafe { Box::from_raw(data.cast::<Rc<Runtime>>()) });
    }
    let data = Box::into_raw(Box::new(runtime));
    // SAFETY: called on the environment's thread; `free` matches the box.
    let status = unsafe { sys::napi_set_instance_data(env.raw(), data.cast(), Some(free), ptr::null_mut()) };
    check(status, "napi_set_instance_data")
}

/// What the thread-safe function finds its runtime by. Filled before the first call.
type Context = OnceCell<Rc<Runtime>>;

/// The thread-safe function that calls JavaScript when something is done. It belongs to the environment, which
/// finalizes it at its end.
pub(crate) struct Wake {
    function: sys::napi_threadsafe_function,
    context: *const Context,
}

impl Wake {
    /// A function that runs [`Runtime::deliver`] with `deliver`.
    pub(crate) fn new(env: &Env, deliver: &Unknown<'_>) -> Result<Self> {
        let name = env.create_string("qcow2")?;
        let context: *mut Context = Box::into_raw(Box::default());
        let mut function = ptr::null_mut();
        // SAFETY: called on the environment's thread with its values; `finalize` frees the context after the last call.
        let status = unsafe {
            sys::napi_create_threadsafe_function(
                env.raw(),
                deliver.raw(),
                ptr::null_mut(),
                name.raw(),
                0,
                1,
                context.cast(),
                Some(finalize),
                context.cast(),
                Some(woken),
                &mut function,
            )
        };
        check(status, "napi_create_threadsafe_function")?;
        Ok(Self { function, context })
    }

    /// The raw function.
    pub(crate) fn function(&self) -> sys::napi_threadsafe_function {
        self.function
    }

    /// Says whose deliveries it makes.
    pub(crate) fn connect(&self, runtime: Rc<Runtime>) {
        // SAFETY: the context lives until the environment finalizes the function; only its thread uses it.
        let context = unsafe { &*self.context };
        context.get_or_init(|| runtime);
    }
}

unsafe extern "C" fn finalize(_env: sys::napi_env, data: *mut c_void, _hint: *mut c_void) {
    // SAFETY: `data` is the context of `Wake::new`; the environment calls this once, after the last call.
    drop(unsafe { Box::from_raw(data.cast::<Context>()) });
}

unsafe extern "C" fn woken(
    env: sys::napi_env,
    callback: sys::napi_value,
    context: *mut c_void,
    _data: *mut c_void,
) {
    // Both are null when the environment is closing.
    if env.is_null() || callback.is_null() {
        return;
    }
    // SAFETY: the context lives until `finalize`.
    let Some(runtime) = (unsafe { &*context.cast::<Context>() }).get() else { return };
    // A JavaScript exception stays pending for Node to report; there is nobody else to tell.
    let _ = catch_unwind(AssertUnwindSafe(|| runtime.deliver(&Env::from_raw(env), callback)));
}

/// Calls `callback(count, others)`: see `start`.
pub(crate) fn call(
    env: &Env,
    callback: sys::napi_value,
    count: usize,
    others: &[(u32, bool, sys::napi_value)],
) -> Result<()> {
    if count == 0 && others.is_empty() {
        return Ok(());
    }
    let env = env.raw();
    let (mut this, mut number) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: called on the environment's thread inside a handle scope, with values of that scope.
    unsafe {
        check(sys::napi_get_undefined(env, &mut this), "napi_get_undefined")?;
        check(sys::napi_create_uint32(env, count as u32, &mut number), "napi_create_uint32")?;
        let list = if others.is_empty() { this } else { list_of(env, others)? };
        let arguments = [number, list];
        let mut result = ptr::null_mut();
        let status =
            sys::napi_call_function(env, this, callback, arguments.len(), arguments.as_ptr(), &mut result);
        check(status, "napi_call_function")
    }
}

/// `[number, succeeded, value, number, succeeded, value, ...]`
///
/// # Safety
/// On the environment's thread, inside a handle scope that has the values.
unsafe fn list_of(env: sys::napi_env, others: &[(u32, bool, sys::napi_value)]) -> Result<sys::napi_value> {
    let mut list = ptr::null_mut();
    // SAFETY: the caller's contract.
    unsafe {
        check(
            sys::napi_create_array_with_length(env, others.len() * 3, &mut list),
            "napi_create_array_with_length",
        )?;
        for (index, &(request, succeeded, value)) in (0u32..).step_by(3).zip(others) {
            let (mut number, mut flag) = (ptr::null_mut(), ptr::null_mut());
            check(sys::napi_create_uint32(env, request, &mut number), "napi_create_uint32")?;
            check(sys::napi_get_boolean(env, succeeded, &mut flag), "napi_get_boolean")?;
            check(sys::napi_set_element(env, list, index, number), "napi_set_element")?;
            check(sys::napi_set_element(env, list, index + 1, flag), "napi_set_element")?;
            check(sys::napi_set_element(env, list, index + 2, value), "napi_set_element")?;
        }
    }
    Ok(list)
}

/// Memory of a typed array of JavaScript's that only this environment's thread uses.
pub(crate) struct Numbers {
    start: NonNull<u32>,
    capacity: usize,
}

impl Numbers {
    /// The memory of a `Uint32Array`, kept for as long as the environment lives.
    pub(crate) fn new(env: &Env, array: &Unknown<'_>) -> Result<Self> {
        let (kind, start, capacity) = typed_array(env, array)?;
        let start = NonNull::new(start.cast::<u32>()).filter(|_| kind == sys::TypedarrayType::uint32_array);
        let start = start.ok_or_else(|| Error::from_reason("numbers is not a Uint32Array"))?;
        let mut reference = ptr::null_mut();
        // SAFETY: called on the environment's thread; the reference is never deleted, the environment's end does.
        let status = unsafe { sys::napi_create_reference(env.raw(), array.raw(), 1, &mut reference) };
        check(status, "napi_create_reference")?;
        Ok(Self { start, capacity })
    }

    /// How many there are.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Writes one; an index beyond the capacity is ignored.
    pub(crate) fn set(&self, index: usize, value: u32) {
        if index < self.capacity {
            // SAFETY: inside the array, whose memory is fixed (see `new`); JavaScript reads it on this thread only.
            unsafe { self.start.add(index).write(value) };
        }
    }
}

/// A `Float64Array` with a copy of `numbers`, in memory of JavaScript's own: external memory is refused by some hosts.
pub(crate) fn float64_array(env: &Env, numbers: &[f64]) -> Result<sys::napi_value> {
    let bytes = size_of_val(numbers);
    let (mut data, mut buffer, mut array) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: called on the environment's thread; the new buffer has room for `bytes` and nobody else knows it yet.
    unsafe {
        let status = sys::napi_create_arraybuffer(env.raw(), bytes, &mut data, &mut buffer);
        check(status, "napi_create_arraybuffer")?;
        if bytes > 0 {
            data.cast::<f64>().copy_from_nonoverlapping(numbers.as_ptr(), numbers.len());
        }
        let kind = sys::TypedarrayType::float64_array;
        let status = sys::napi_create_typedarray(env.raw(), kind, numbers.len(), buffer, 0, &mut array);
        check(status, "napi_create_typedarray")?;
    }
    Ok(array)
}

/// Kind, address and number of elements of a typed array.
pub(crate) fn typed_array(
    env: &Env,
    array: &Unknown<'_>,
) -> Result<(sys::napi_typedarray_type, *mut c_void, usize)> {
    let (mut kind, mut length, mut data) = (0, 0, ptr::null_mut());
    // SAFETY: `env` and `array` are those of the running call; the out pointers are valid or null.
    let status = unsafe {
        sys::napi_get_typedarray_info(
            env.raw(),
            array.raw(),
            &mut kind,
            &mut length,
            &mut data,
            ptr::null_mut(),
            ptr::null_mut(),
        )
    };
    check(status, "napi_get_typedarray_info")?;
    Ok((kind, data, length))
}
