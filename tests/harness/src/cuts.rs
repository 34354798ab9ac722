//! Power cuts at random moments. A machine's writes to a disk are logged once, and replayed up to each moment without a part
//! of the writes that the machine had not flushed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::disk::{self, on_disk};
use crate::proc::succeed;

/// Size of a sector, and of the header of an entry.
const SECTOR: u64 = 512;
/// Flag of an entry without data in the log.
const DISCARD: u64 = 4;

/// A disk, and the log of what a machine has written to it since, in the format of dm-log-writes.
pub struct Recording {
    /// Copy of the disk from before the machine was on.
    before: PathBuf,
    /// The log, which the emulator writes.
    pub(crate) log: PathBuf,
    /// Size of the log at the first moment of interest.
    from: u64,
}

/// A write of the machine, or a flush, which has no sectors.
struct Write {
    /// Place of the header in the log.
    place: u64,
    sector: u64,
    sectors: u64,
}

impl Recording {
    /// Returns a recording with its files in `work`, see [`crate::vm::Setup::recording`].
    #[must_use]
    pub fn new(work: &Path) -> Self {
        Self { before: work.join("before.img"), log: work.join("writes.log"), from: 0 }
    }

    /// Copies the disk, which no machine may use yet.
    pub(crate) fn start(&self, disk: &Path) -> Result<()> {
        File::create(&self.log)?;
        copy(disk, &self.before)
    }

    /// Lets the moments of power cuts begin now.
    pub fn begin(&mut self) -> Result<()> {
        self.from = fs::metadata(&self.log)?.len();
        Ok(())
    }

    /// Calls `check` with the number of a power cut and the disk after it, for several moments between [`Recording::begin`] and
    /// the end of the log, in two threads. PIVOT_POWER_CUTS has their number. Every second moment is among the last writes,
    /// which replace the boot loader entries.
    pub fn replay(self, check: impl Fn(usize, &Path) -> Result<()> + Sync) -> Result<()> {
        let log = File::open(&self.log)?;
        let writes = read(&log)?;
        let first = writes.iter().position(|write| write.place >= self.from).context("nothing was written")?;
        let moments = moments(first, writes.len(), asked()?.unwrap_or(2));
        println!("       {} writes and flushes, cuts after {moments:?}", writes.len() - first);
        let cuts: Vec<_> = moments.into_iter().enumerate().collect();
        let disk = |cut: usize| self.before.with_extension(format!("cut-{cut}"));
        let check = |&(cut, moment): &(usize, usize)| {
            check(cut, &disk(cut)).with_context(|| format!("after a power cut at write {}", moment - first))
        };
        let mut done = 0;
        for pair in cuts.chunks(2) {
            for (cut, moment) in pair {
                done = self.cut(&log, &writes, done, *moment, &disk(*cut))?;
            }
            at_once(pair, &check)?;
            pair.iter().try_for_each(|(cut, _)| fs::remove_file(disk(*cut)))?;
        }
        Ok([&self.before, &self.log].iter().try_for_each(fs::remove_file)?)
    }

    /// Makes the disk after a power cut: with all writes up to the last flush before it, and with some of the later ones.
    /// `before` already has `done` writes. Returns the number that it has now.
    fn cut(&self, log: &File, writes: &[Write], done: usize, moment: usize, to: &Path) -> Result<usize> {
        let flushed =
            writes[..moment].iter().rposition(|write| write.sectors == 0).map_or(done, |last| last + 1).max(done);
        let before = File::options().write(true).open(&self.before)?;
        writes[done..flushed].iter().try_for_each(|write| write.apply(log, &before))?;
        copy(&self.before, to)?;
        let disk = File::options().write(true).open(to)?;
        let later = writes[flushed..moment].iter().enumerate();
        let survives = |number: usize| pick(moment + number, 0, 2) == 1;
        later.filter(|(number, _)| survives(*number)).try_for_each(|(_, write)| write.apply(log, &disk))?;
        Ok(flushed)
    }
}

/// Returns the moments of `count` power cuts between two writes, in order. Every second one is among the last twentieth of the
/// writes, and half of these among the last hundredth.
fn moments(first: usize, end: usize, count: usize) -> Vec<usize> {
    let last = |share: usize| end - (end - first) / share;
    let from = |cut: usize| [first, last(20), first, last(100)][cut % 4];
    let mut moments: Vec<_> = (0..count).map(|cut| pick(cut, from(cut), end + 1)).collect();
    moments.sort_unstable();
    moments
}

/// Returns the number of power cuts that the caller of the test asks for. Each of these is followed by boots.
pub fn asked() -> Result<Option<usize>> {
    std::env::var("PIVOT_POWER_CUTS").ok().map(|count| Ok(count.parse()?)).transpose()
}

/// Calls `check` with each item in a thread, and waits for all.
fn at_once<T: Sync>(items: &[T], check: &(impl Fn(&T) -> Result<()> + Sync)) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(move || check(item))).collect();
        let ends: Vec<_> =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect();
        ends.into_iter().collect()
    })
}

impl Write {
    fn apply(&self, log: &File, disk: &File) -> Result<()> {
        let mut data = vec![0; usize::try_from(self.sectors * SECTOR)?];
        log.read_exact_at(&mut data, self.place + SECTOR)?;
        Ok(disk.write_all_at(&data, self.sector * SECTOR)?)
    }
}

/// Reads the headers of a log. The first sector has its version, and the machine may have been killed during the last entry.
fn read(log: &File) -> Result<Vec<Write>> {
    let (size, mut place, mut writes) = (log.metadata()?.len(), SECTOR, Vec::new());
    while place + SECTOR <= size {
        let mut header = [0; 32];
        log.read_exact_at(&mut header, place)?;
        let field = |index: usize| u64::from_le_bytes(std::array::from_fn(|byte| header[8 * index + byte]));
        let (sector, sectors, flags, more) = (field(0), field(1), field(2), field(3));
        if flags >= 32 || more != 0 {
            bail!("the log of writes has an invalid entry at {place}: {header:?}");
        }
        let length = if flags & DISCARD == 0 { sectors * SECTOR } else { 0 };
        if place + SECTOR + length > size {
            break;
        }
        if flags & DISCARD == 0 {
            writes.push(Write { place, sector, sectors });
        }
        place += SECTOR + length;
    }
    Ok(writes)
}

/// Returns a random number, the same in each run.
fn pick(seed: usize, from: usize, to: usize) -> usize {
    let mut bits = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    from + usize::try_from((bits ^ (bits >> 31)) % (to - from).max(1) as u64).unwrap_or(0)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    succeed(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).args([from, to])).map(drop)
}

/// Checks a disk after a power cut. The file system and all objects are sound. The refs with which ostree-ext finds an image
/// and its layers name whole commits. Each boot loader entry names a kernel and a complete deployment: its files are objects of
/// the repo, which has all objects of its commit. Returns the commits of the entries, the one that boots next first.
pub fn bootable(disk: &Path) -> Result<Vec<String>> {
    const CHECK: &str = r#"
        set -o pipefail; shopt -s nullglob
        ostree fsck -q --repo=ostree/repo >/dev/null
        # fsck does not look for the objects of a commit that is marked as partial.
        for ref in $(ostree refs --repo=ostree/repo --list ostree/container); do
            ids=$(ostree ls -RC --repo=ostree/repo "$ref" / | sed -n 's,^[-l][^/]* \([0-9a-f]\{64\}\) .*,\1,p')
            for id in $ids; do
                object=ostree/repo/objects/${id:0:2}/${id:2}.file
                test -e "$object" || test -L "$object"
            done
        done
        entries=(boot/loader/entries/*.conf)
        for entry in $(printf '%s\n' "${entries[@]}" | sort -rV); do
            field() { sed -n "s,^$1 /\(boot/\)*,boot/,p" "$entry"; }
            root=$(readlink -e ".$(grep -o 'ostree=[^ ]*' "$entry" | cut -d= -f2)")
            cmp "$(field linux)" "$root"/usr/lib/modules/*/vmlinuz
            # The archive of a carried agent may follow.
            initramfs=("$root"/usr/lib/modules/*/initramfs.img)
            cmp --bytes="$(stat --format=%s "${initramfs[0]}")" "$(field initrd)" "${initramfs[0]}"
            commit=$(basename "$root"); commit=${commit%.*}
            test ! -e "ostree/repo/state/$commit.commitpartial"
            test -z "$(find "$root/usr" -type f -size +0 -links 1)"
            test -s "$root/etc/passwd"
            for file in $(cd "$root/usr/etc" && find . -type f -size +0); do
                test ! -e "$root/etc/$file" || test -s "$root/etc/$file"
            done
            diff <(cd "$root" && find usr | sort) \
                <(ostree ls -R --nul-filenames-only --repo=ostree/repo "$commit" /usr | tr '\0' '\n' | cut -c2- | sort) >&2
            echo "$commit"
        done"#;
    let commits = on_disk(disk, CHECK)?;
    disk::check(disk)?;
    Ok(commits.lines().map(str::to_owned).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Returns an entry of a log that fills a sector with `value`, or a flush.
    fn entry(sector: u64, value: Option<u8>) -> Vec<u8> {
        let mut bytes =
            [sector, u64::from(value.is_some()), u64::from(value.is_none()), 0].map(u64::to_le_bytes).concat();
        bytes.resize(512, 0);
        bytes.extend(value.map(|value| [value; 512]).into_iter().flatten());
        bytes
    }

    #[test]
    fn flushed_writes_survive_a_power_cut_and_others_may() {
        let work = std::env::temp_dir().join(format!("testbed-cuts-{}", std::process::id()));
        fs::create_dir_all(&work).unwrap();
        let disk = work.join("disk.img");
        fs::write(&disk, [0; 1024]).unwrap();
        let mut recording = Recording::new(&work);
        recording.start(&disk).unwrap();
        let log = [vec![0; 512], entry(0, Some(1)), entry(0, None)].concat();
        fs::write(&recording.log, &log).unwrap();
        recording.begin().unwrap();
        let more = [entry(1, Some(2)), entry(1, None), entry(1, Some(3)), entry(1, Some(4)), vec![9; 100]].concat();
        fs::write(&recording.log, [log, more].concat()).unwrap();
        let seen = Mutex::new(Vec::new());
        recording
            .replay(|_, disk| {
                let bytes = fs::read(disk)?;
                assert_eq!(bytes[0], 1, "flushed before the first moment");
                seen.lock().unwrap().push(bytes[512]);
                Ok(())
            })
            .unwrap();
        assert_eq!(seen.lock().unwrap().len(), 2);
        fs::remove_dir_all(work).unwrap();
    }
}
