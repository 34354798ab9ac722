//! Patterns of file and unit names: `*` stands for any run of bytes, `?` for one. Nothing else is special.

/// Whether all of `name` is what `pattern` says. Takes time by the product of both lengths at most: a star that matched too
/// little is the only thing that is ever tried again, and only the last one.
pub fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut seen) = (0, 0);
    // Behind the last star, and up to where it is taken to reach.
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
                let Some((behind, reach)) = star else { return false };
                star = Some((behind, reach + 1));
                (at, seen) = (behind, reach + 1);
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
    fn stars_and_question_marks() {
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
            assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    proptest! {
        /// The same as the regular expression that says it.
        #[test]
        fn as_a_regular_expression(pattern in "[ab*?.]{0,8}", name in "[ab.]{0,10}") {
            let text = regex::escape(&pattern).replace(r"\*", ".*").replace(r"\?", ".");
            let expected = regex::Regex::new(&format!("^{text}$")).is_ok_and(|regex| regex.is_match(&name));
            prop_assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), expected);
        }
    }
}
