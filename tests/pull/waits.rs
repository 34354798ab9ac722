//! Waits for conditions.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use node_store::PullProgress;

/// Waits until a pull waits for a lock, and returns the holder of the lock.
pub async fn holder_of_the_lock(progress: &PullProgress) -> String {
    loop {
        if let Some(holder) = progress.waiting_for() {
            return holder;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Counts the files below a directory that another process may change.
pub fn files_below(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| if entry.file_type().is_ok_and(|kind| kind.is_dir()) { files_below(&entry.path()) } else { 1 })
        .sum()
}

/// Waits until a process has ended, or has made `more` files below a directory that had `before`.
pub fn wait_for_files(child: &mut Child, dir: &Path, before: usize, more: usize) {
    while files_below(dir) < before + more && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
}
