//! Framing of GVariant arrays and tuples whose elements have variable sizes and no alignment.
//!
//! Format source: the GVariant specification. The end offsets of elements follow the elements. They are little-endian, and
//! their width depends on the size of the container.

/// Serialises an array of elements of variable size.
pub(super) fn array(elements: impl Iterator<Item = Vec<u8>> + Clone) -> Vec<u8> {
    // One allocation: growing the vector would need twice the memory.
    let size = elements.clone().map(|element| element.len()).sum();
    let (mut out, mut ends) = (Vec::with_capacity(size), Vec::new());
    for element in elements {
        out.extend(element);
        ends.push(out.len());
    }
    append_offsets(out, &ends)
}

/// Serialises a tuple of members of variable size.
pub(super) fn tuple(members: &[&[u8]]) -> Vec<u8> {
    let ends = members.iter().scan(0, |end, member| {
        *end += member.len();
        Some(*end)
    });
    let mut ends: Vec<usize> = ends.collect();
    ends.pop();
    ends.reverse();
    append_offsets(members.concat(), &ends)
}

/// Appends offsets in the width that the size of the container requires.
fn append_offsets(mut body: Vec<u8>, offsets: &[usize]) -> Vec<u8> {
    let whole = |width: &usize| offset_width(body.len() + offsets.len() * width) == *width;
    let width = [1, 2, 4, 8].into_iter().find(whole).unwrap_or(8);
    body.reserve_exact(offsets.len() * width);
    for offset in offsets {
        body.extend(&(*offset as u64).to_le_bytes()[..width]);
    }
    body
}

/// Returns the width of the offsets in a container of this many bytes.
fn offset_width(container: usize) -> usize {
    [1, 2, 4].into_iter().find(|width| container < 1 << (8 * width)).unwrap_or(8)
}

fn read_offset(bytes: &[u8]) -> Option<usize> {
    usize::try_from(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))).ok()
}

/// Splits a tuple into its members, all of variable size. The end offsets of all members except the last are at the end of
/// the tuple, in reverse order.
pub(super) fn members<const N: usize>(tuple: &[u8]) -> Option<[&[u8]; N]> {
    let width = offset_width(tuple.len());
    let body = tuple.len().checked_sub((N - 1) * width)?;
    let mut members = [&[][..]; N];
    let mut start = 0;
    for (index, member) in members.iter_mut().enumerate() {
        let end = if index == N - 1 {
            body
        } else {
            let at = tuple.len() - (index + 1) * width;
            read_offset(&tuple[at..at + width])?
        };
        *member = tuple[..body].get(start..end)?;
        start = end;
    }
    Some(members)
}

/// Splits an array into its elements. An element is `None` if its offset is wrong. Returns `None` if the table of offsets
/// is invalid.
pub(super) fn elements(array: &[u8]) -> Option<impl Iterator<Item = Option<&[u8]>>> {
    let width = offset_width(array.len());
    let table = match array {
        [] => 0,
        _ => read_offset(&array[array.len().checked_sub(width)?..])?,
    };
    let offsets = array.get(table..)?;
    if offsets.len() % width != 0 || (offsets.is_empty() && !array.is_empty()) {
        return None;
    }
    let body = &array[..table];
    let mut start = 0;
    Some(offsets.chunks_exact(width).map(move |offset| {
        let end = read_offset(offset)?;
        let element = body.get(start..end)?;
        start = end;
        Some(element)
    }))
}
