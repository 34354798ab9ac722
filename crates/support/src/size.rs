//! Sizes: as text, and as the space that files need.

use std::io;
use std::path::Path;

/// Returns `bytes` with a binary unit and one decimal, for example `12.3 MiB`. Below 1 KiB: `512 B`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// The unit in which a file system allocates space. On tmpfs it is a memory page, which has 4, 16 or 64 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize(u64);

impl BlockSize {
    /// The smallest and the largest unit. Some file systems report the size of their requests instead.
    const LIMITS: (u64, u64) = (512, 64 << 10);

    /// Returns a unit of this many bytes, within the limits.
    pub fn new(bytes: u64) -> Self {
        Self(bytes.clamp(Self::LIMITS.0, Self::LIMITS.1))
    }

    /// Returns the unit of the file system at `path`.
    ///
    /// # Errors
    /// The file system does not answer.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::new(rustix::fs::statvfs(path)?.f_frsize))
    }

    /// Returns a memory page.
    pub fn page() -> Self {
        Self::new(rustix::param::page_size() as u64)
    }

    /// Returns the space that a file of `size` bytes needs.
    pub fn allocated(self, size: u64) -> u64 {
        size.checked_next_multiple_of(self.0).unwrap_or(u64::MAX)
    }

    /// Returns the space that a file needs beyond its size, on average.
    pub fn slack(self) -> u64 {
        self.0 / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_occupy_whole_pages() {
        for (page, size, expected) in [
            (4 << 10, 0, 0),
            (4 << 10, 1, 4 << 10),
            (4 << 10, 4 << 10, 4 << 10),
            (64 << 10, 1, 64 << 10),
            (64 << 10, (64 << 10) + 1, 128 << 10),
            (1, 1, 512),
            (1 << 20, 1, 64 << 10),
            (64 << 10, u64::MAX, u64::MAX),
        ] {
            assert_eq!(BlockSize::new(page).allocated(size), expected, "{size} bytes on pages of {page}");
        }
        assert_eq!((BlockSize::new(4096).slack(), BlockSize::new(64 << 10).slack()), (2048, 32 << 10));
        assert_eq!(BlockSize::page().allocated(1), rustix::param::page_size() as u64);
    }
}
