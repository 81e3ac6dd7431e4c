//! What a device says of the requests that it likes, and the size of a page.

use std::fs::File;

use super::super::DeviceLimits;

/// Bytes of a page of memory.
#[cfg(unix)]
pub(crate) fn page_size() -> u32 {
    u32::try_from(rustix::param::page_size()).unwrap_or(4096)
}

/// What it is on every processor that Windows runs on.
#[cfg(not(unix))]
pub(crate) fn page_size() -> u32 {
    4096
}

/// The queue of a block device, as sysfs describes it; a partition has its disk's. Nothing where sysfs is not mounted.
#[cfg(target_os = "linux")]
pub(crate) fn device_limits(file: &File) -> DeviceLimits {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = file.metadata() else { return DeviceLimits::default() };
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let device = std::path::PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // Behind the link: a partition lies in the folder of its disk.
    let Ok(device) = device.canonicalize() else { return DeviceLimits::default() };
    let queues = [Some(device.join("queue")), device.parent().map(|disk| disk.join("queue"))];
    let Some(queue) = queues.into_iter().flatten().find(|queue| queue.is_dir()) else {
        return DeviceLimits::default();
    };
    let number = |name: &str| -> Option<u32> {
        let number = std::fs::read_to_string(queue.join(name)).ok()?.trim().parse().ok()?;
        (number > 0).then_some(number)
    };
    DeviceLimits {
        // The kernel gives this number as one of 16 bits of sectors.
        max_transfer: number("max_sectors_kb").map(|kib| kib.saturating_mul(2).min(u16::MAX.into()) * 512),
        max_segments: number("max_segments"),
        discard_alignment: number("discard_granularity"),
        zeroes_alignment: number("logical_block_size"),
    }
}

/// Elsewhere nothing is asked.
#[cfg(not(target_os = "linux"))]
pub(crate) fn device_limits(_: &File) -> DeviceLimits {
    DeviceLimits::default()
}
