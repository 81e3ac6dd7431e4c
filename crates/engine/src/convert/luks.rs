//! Into a new LUKS file: a raw disk behind a cipher, and its header when all is there.

use std::sync::Arc;

use qcow2_core::convert::{Context, RawSink, Rules, Sink, Worker};
use qcow2_luks::NewLuks;
use qcow2_luks::layer::space_of;

use super::ConvertOptions;
use crate::create::Preallocation;
use crate::{Job, Result, Storage};

/// A LUKS file that is being made.
pub(super) struct LuksSink {
    data: RawSink,
    luks: NewLuks,
    host: Arc<dyn Storage>,
}

impl LuksSink {
    /// Makes the target ready, which is no image then.
    ///
    /// # Errors
    /// As [`NewLuks::begin`] and [`RawSink::new`].
    pub(super) fn new(
        context: &Context<'_>,
        host: Arc<dyn Storage>,
        luks: NewLuks,
        preallocation: Preallocation,
    ) -> Result<Self> {
        luks.begin(&*host, context.source.virtual_size(), context.job)?;
        let space = space_of(preallocation);
        let data = RawSink::new(context, luks.data(Arc::clone(&host)), space, false)?.over_noise();
        Ok(Self { data, luks, host })
    }
}

impl Sink for LuksSink {
    fn rules(&self) -> Rules {
        self.data.rules()
    }

    fn worker(&self) -> Result<Worker<'_>> {
        self.data.worker()
    }

    fn finish(self: Box<Self>, options: &ConvertOptions, job: &Job) -> Result<()> {
        let Self { data, luks, host } = *self;
        Box::new(data).finish(options, job)?;
        luks.publish(&*host, options.durable)
    }
}
