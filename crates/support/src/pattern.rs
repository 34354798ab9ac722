//! Patterns of file and unit names: `*` matches any number of bytes, `?` matches one. No other byte is special.

/// Returns true if `pattern` matches all of `name`.
///
/// The time is at most proportional to the product of both lengths: on a mismatch, only the last star is extended.
pub fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    // The position after the last star in the pattern, and the end in the name of the text that this star matches.
    let mut star = None;
    while seen < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                at += 1;
                star = Some((at, seen));
            }
            Some(&byte) if byte == b'?' || byte == name[seen] => {
                at += 1;
                seen += 1;
            }
            _ => {
                let Some((after, end)) = star else { return false };
                star = Some((after, end + 1));
                (at, seen) = (after, end + 1);
            }
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stars_match_any_run_and_question_marks_one_byte() {
        for (pattern, name, expected) in [
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("abcd", "abc", false),
            ("node-image-*", "node-image-", true),
            ("node-image-*", "node-image-pull.service", true),
            ("node-image-*", "xnode-image-pull", false),
            ("*pivot*", "95node-pivot", true),
            ("a*b*c", "aXbXbYc", true),
            ("a*b*c", "ab", false),
            ("*a", "aa", true),
            ("a*a", "a", false),
            ("*", "", true),
            ("**", "", true),
            ("", "", true),
            ("", "a", false),
            ("?.service", "a.service", true),
            ("?.service", "ab.service", false),
            ("?", "", false),
            ("*?", "ab", true),
            ("a@*.service", "a@1.service", true),
            ("a@*.service", "a@.service", true),
            ("[a]", "a", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    proptest! {
        #[test]
        fn patterns_match_like_the_equivalent_regular_expression(pattern in "[ab*?.]{0,8}", name in "[ab.]{0,10}") {
            let text = regex::escape(&pattern).replace(r"\*", ".*").replace(r"\?", ".");
            let expected = regex::Regex::new(&format!("^{text}$")).is_ok_and(|regex| regex.is_match(&name));
            prop_assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected);
        }
    }
}
