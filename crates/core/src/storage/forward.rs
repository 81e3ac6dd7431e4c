//! Storages in front of others.

/// Writes methods of [`ReadStorage`](super::ReadStorage) and [`Storage`](super::Storage) that pass on to the storage in a field:
/// `forward_storage!(inner: len traits path)`.
#[macro_export]
macro_rules! forward_storage {
    ($inner:tt: $($method:ident)*) => { $($crate::forward_storage!(@$method $inner);)* };
    (@read_at $inner:tt) => {
        fn read_at(&self, buf: $crate::MemMut<'_>, offset: u64) -> std::io::Result<usize> {
            self.$inner.read_at(buf, offset)
        }
    };
    (@len $inner:tt) => {
        fn len(&self) -> std::io::Result<u64> {
            self.$inner.len()
        }
    };
    (@is_empty $inner:tt) => {
        fn is_empty(&self) -> std::io::Result<bool> {
            self.$inner.is_empty()
        }
    };
    (@read_batch $inner:tt) => {
        fn read_batch(&self, batch: &mut [$crate::storage::ReadTransfer<'_>]) {
            self.$inner.read_batch(batch);
        }
    };
    (@run_in $inner:tt) => {
        fn run_in(&self, range: std::ops::Range<u64>) -> std::io::Result<$crate::storage::Run> {
            self.$inner.run_in(range)
        }
    };
    (@allocated_bytes $inner:tt) => {
        fn allocated_bytes(&self) -> std::io::Result<u64> {
            self.$inner.allocated_bytes()
        }
    };
    (@identity $inner:tt) => {
        fn identity(&self) -> Option<$crate::storage::Identity> {
            self.$inner.identity()
        }
    };
    (@traits $inner:tt) => {
        fn traits(&self) -> $crate::storage::Traits {
            self.$inner.traits()
        }
    };
    (@io_limits $inner:tt) => {
        fn io_limits(&self) -> $crate::storage::IoLimits {
            self.$inner.io_limits()
        }
    };
    (@path $inner:tt) => {
        fn path(&self) -> Option<&std::path::Path> {
            self.$inner.path()
        }
    };
    (@operation $inner:tt) => {
        fn operation(&self, operation: $crate::storage::Operation) -> &'static str {
            self.$inner.operation(operation)
        }
    };
    (@is_transient $inner:tt) => {
        fn is_transient(&self, error: &std::io::Error) -> bool {
            self.$inner.is_transient(error)
        }
    };
    (@lock $inner:tt) => {
        fn lock(
            &self,
            claim: $crate::storage::Claim,
            locking: $crate::storage::Locking,
        ) -> $crate::Result<()> {
            self.$inner.lock(claim, locking)
        }
    };
    (@arriving $inner:tt) => {
        fn arriving(&self) -> Option<&dyn $crate::storage::Arriving> {
            self.$inner.arriving()
        }
    };
    // Where offsets or bytes are others than the inner storage's.
    (@no_arriving $inner:tt) => {
        fn arriving(&self) -> Option<&dyn $crate::storage::Arriving> {
            None
        }
    };
    (@as_fd $inner:tt) => {
        #[cfg(unix)]
        fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            self.$inner.as_fd()
        }
    };
    // Where the kernel must not go past this storage.
    (@no_fd $inner:tt) => {
        #[cfg(unix)]
        fn as_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
            None
        }
    };
    // By this storage's own reads.
    (@read_each $inner:tt) => {
        fn read_batch(&self, batch: &mut [$crate::storage::ReadTransfer<'_>]) {
            $crate::storage::read_each(self, batch);
        }
    };
    (@forget $inner:tt) => {
        fn forget(&self, range: std::ops::Range<u64>) {
            self.$inner.forget(range);
        }
    };
    (@write_at $inner:tt) => {
        fn write_at(&self, buf: $crate::Mem<'_>, offset: u64) -> std::io::Result<usize> {
            self.$inner.write_at(buf, offset)
        }
    };
    (@set_len $inner:tt) => {
        fn set_len(&self, len: u64) -> std::io::Result<()> {
            self.$inner.set_len(len)
        }
    };
    (@sync_data $inner:tt) => {
        fn sync_data(&self) -> std::io::Result<()> {
            self.$inner.sync_data()
        }
    };
    (@begin_sync $inner:tt) => {
        fn begin_sync(&self) {
            self.$inner.begin_sync();
        }
    };
    (@write_vectored_at $inner:tt) => {
        fn write_vectored_at(&self, bufs: &[$crate::Mem<'_>], offset: u64) -> std::io::Result<usize> {
            self.$inner.write_vectored_at(bufs, offset)
        }
    };
    // By this storage's own writes.
    (@write_each $inner:tt) => {
        fn write_batch(&self, batch: &mut [$crate::storage::WriteTransfer<'_>]) {
            $crate::storage::write_each(self, batch);
        }
    };
    (@check_close $inner:tt) => {
        fn check_close(&self) -> std::io::Result<()> {
            self.$inner.check_close()
        }
    };
    (@write_zeroes $inner:tt) => {
        fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> std::io::Result<()> {
            self.$inner.write_zeroes(offset, length, unmap)
        }
    };
    (@discard $inner:tt) => {
        fn discard(&self, offset: u64, length: u64) -> std::io::Result<()> {
            self.$inner.discard(offset, length)
        }
    };
    (@allocate $inner:tt) => {
        fn allocate(&self, offset: u64, length: u64) -> std::io::Result<()> {
            self.$inner.allocate(offset, length)
        }
    };
    (@allocate_ahead $inner:tt) => {
        fn allocate_ahead(&self, offset: u64, length: u64) -> std::io::Result<()> {
            self.$inner.allocate_ahead(offset, length)
        }
    };
    // A storage that does not take space ahead.
    (@never_ahead $inner:tt) => {
        fn allocate_ahead(&self, _: u64, _: u64) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
    };
    (@clone_range $inner:tt) => {
        fn clone_range(
            &self,
            from: &dyn $crate::storage::ReadStorage,
            from_offset: u64,
            offset: u64,
            length: u64,
        ) -> std::io::Result<()> {
            self.$inner.clone_range(from, from_offset, offset, length)
        }
    };
    // A storage that shares nothing.
    (@never_clone $inner:tt) => {
        fn clone_range(
            &self,
            _: &dyn $crate::storage::ReadStorage,
            _: u64,
            _: u64,
            _: u64,
        ) -> std::io::Result<()> {
            Err(std::io::ErrorKind::Unsupported.into())
        }
    };
}
