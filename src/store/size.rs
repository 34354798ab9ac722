//! How large the node store's tmpfs may grow.

/// The size limit in bytes for the node store's tmpfs, given the memory that is available now
/// (`MemAvailable`) and, when the manifest is known, the compressed size of the image's layers.
///
/// A tmpfs limit reserves nothing: pages count only once written. So the limit is generous, three
/// times the compressed layers plus room for metadata, and its ceiling protects the host: at least
/// a quarter of what is available (but no more than 1 GiB of it) stays for everybody else.
pub fn tmpfs_limit(mem_available: u64, image_bytes: Option<u64>) -> u64 {
    const MIB: u64 = 1 << 20;
    let spare = (mem_available / 4).min(1024 * MIB);
    let ceiling = mem_available - spare;
    match image_bytes {
        Some(bytes) => bytes.saturating_mul(3).saturating_add(256 * MIB).min(ceiling),
        None => ceiling,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn table() {
        const GIB: u64 = 1 << 30;
        for (available, image, expected) in [
            (16 * GIB, None, 15 * GIB),
            (16 * GIB, Some(GIB), 3 * GIB + GIB / 4),
            (3 * GIB, Some(GIB), 3 * GIB - 3 * GIB / 4),
            (0, None, 0),
            (0, Some(GIB), 0),
        ] {
            assert_eq!(tmpfs_limit(available, image), expected, "{available} {image:?}");
        }
    }

    proptest! {
        #[test]
        fn never_all_the_memory_and_monotonic(available in any::<u64>(), image in proptest::option::of(any::<u64>())) {
            let limit = tmpfs_limit(available, image);
            prop_assert!(limit <= available);
            prop_assert!(limit <= tmpfs_limit(available, None));
            prop_assert!(available < 8 || limit < available);
        }
    }
}
