use super::*;
use proptest::prelude::*;

struct Pieces(Vec<Vec<u8>>);

impl Chunks for Pieces {
    fn next(&mut self) -> io::Result<Vec<u8>> {
        Ok(self.0.pop().unwrap_or_default())
    }
}

fn chunked(data: Vec<u8>, size: usize) -> TarStream<impl Chunks> {
    let mut chunks: Vec<Vec<u8>> = data.chunks(size.max(1)).map(<[u8]>::to_vec).collect();
    chunks.reverse();
    TarStream::new(Pieces(chunks))
}

fn archive() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o4755);
    header.set_uid(7);
    header.set_gid(8);
    builder.append_data(&mut header, "short", b"hello".as_slice()).unwrap();
    builder.append_pax_extensions([("SCHILY.xattr.user.x", b"1".as_slice()), ("path", b"from-pax")]).unwrap();
    builder.append_data(&mut header, "replaced", b"world".as_slice()).unwrap();
    let long = "d/".repeat(120) + "end";
    builder.append_data(&mut header, &long, b"12345".as_slice()).unwrap();
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "link", "t/".repeat(120)).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn entries_do_not_depend_on_the_size_of_chunks() {
    for size in [1, 3, 511, 512, 513, 100_000] {
        let mut tar = chunked(archive(), size);
        let mut seen = Vec::new();
        while let Some(entry) = tar.next_entry().unwrap() {
            let mut content = Vec::new();
            if seen.len() != 1 {
                tar.read_content(&mut content).unwrap();
            }
            seen.push((String::from_utf8(entry.path).unwrap(), content, entry.uid, entry.mode));
        }
        assert_eq!(seen.len(), 4, "{size}");
        assert_eq!(seen[0], ("short".into(), b"hello".to_vec(), 7, 0o4755));
        assert_eq!(seen[1].0, "from-pax");
        assert_eq!(seen[2].0, "d/".repeat(120) + "end");
        assert_eq!(seen[2].1, b"12345");
    }
}

/// As in libarchive and Go, a size of a device or fifo is ignored and the next header follows.
#[test]
fn only_files_have_content() {
    for kind in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let data = [raw(kind, b"00000001000\0", b""), archive()].concat();
        let mut tar = chunked(data, 512);
        assert_eq!(tar.next_entry().unwrap().unwrap().path, b"x");
        assert!(tar.content().unwrap().is_none());
        assert_eq!(tar.next_entry().unwrap().unwrap().path, b"short", "{}", char::from(kind));
    }
}

/// Makes a header without the checks of a library, and its content.
fn raw(kind: u8, size: &[u8; 12], content: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..1].copy_from_slice(b"x");
    header.as_old_mut().linkflag = [kind];
    header.as_old_mut().size = *size;
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    out.extend(content);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn octal(size: usize) -> [u8; 12] {
    format!("{size:011o}\0").into_bytes().try_into().unwrap()
}

#[test]
fn invalid_headers_are_rejected() {
    let large = |kind: u8, size: usize, times: usize| raw(kind, &octal(size), &vec![b'1'; size]).repeat(times);
    let mut record = vec![b' '; 600_000];
    record[..19].copy_from_slice(b"600000 comment=long");
    record[599_999] = b'\n';
    let pax = raw(b'x', &octal(600_000), &record);
    for (archive, words) in [
        (raw(b'0', &[0xff; 12], b""), "an entry of 18446744073709551615 bytes"),
        (raw(b'0', b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", b""), "an entry of 9223372036854775807 bytes"),
        (raw(b'0', b"777777777777", b"abc"), "ends early"),
        (raw(b'0', b"99 no size  ", b""), "invalid size"),
        (large(b'L', 2 << 20, 1), "more than 1048576 bytes"),
        (large(b'K', 2 << 20, 1), "more than 1048576 bytes"),
        (large(b'x', 2 << 20, 1), "more than 1048576 bytes"),
        (pax.repeat(2), "more than 1048576 bytes"),
        (large(b'L', 600_000, 2), "more than 1048576 bytes"),
        (raw(b'g', &octal(600_000), &record).repeat(2), "global headers"),
        (raw(b'x', &octal(20), b"99 path=too-long\n   "), "PAX header"),
        (raw(b'x', &octal(20), b"0 path=x\n           "), "PAX header"),
        (raw(b'S', &octal(0), b""), "sparse file"),
        ([vec![0; 512], raw(b'0', &octal(0), b"")].concat(), "half an end marker"),
    ] {
        let entry = raw(b'0', &octal(0), b"");
        let mut tar = chunked([archive, entry].concat(), 4096);
        let result = loop {
            match tar.next_entry() {
                Ok(Some(entry)) if entry.kind != EntryType::Regular => {}
                Ok(Some(entry)) if entry.size > 0 => {}
                other => break other.map(|entry| entry.is_some()).map_err(|error| error.to_string()),
            }
        };
        assert!(result.as_ref().is_err_and(|error| error.contains(words)), "{words}: {result:?}");
    }
    // One extended header of 600 kB is accepted, and bytes after the end are ignored.
    let mut tar = chunked([pax, raw(b'0', &octal(3), b"abc"), vec![0; 1024], vec![7; 700]].concat(), 4096);
    assert_eq!(tar.next_entry().unwrap().unwrap().size, 3);
    assert!(tar.next_entry().unwrap().is_none());
}

#[test]
fn every_truncation_is_detected() {
    let whole = archive();
    let contents = whole.len() - 1024;
    for length in 0..contents {
        let mut tar = chunked(whole[..length].to_vec(), 4096);
        let mut count = 0;
        let result = loop {
            match tar.next_entry() {
                Ok(Some(_)) => count += 1,
                other => break other,
            }
        };
        // The archive may end between two entries; the diff id detects that.
        assert!(matches!(result, Err(TarError::Truncated)) || (length % 512 == 0 && count < 4), "{length}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_handled(data in prop::collection::vec(any::<u8>(), 0..3000), flips in prop::collection::vec((0_usize..4000, any::<u8>()), 0..6)) {
        let mut broken = archive();
        for (at, byte) in flips {
            let at = at % broken.len();
            broken[at] = byte;
        }
        for data in [data, broken] {
            let mut tar = chunked(data, 700);
            while let Ok(Some(_)) = tar.next_entry() {}
        }
    }
}
