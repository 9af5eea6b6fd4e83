//! The kernel's command line as Linux reads it (`lib/cmdline.c`, `next_arg`, and `kernel/params.c`,
//! `parse_args`): parameters between white space that is not in double quotes, up to one that is `--`;
//! what is behind that is for init.

/// White space for Linux, as far as it is ASCII.
fn is_space(character: char) -> bool {
    matches!(character, '\t'..='\r' | ' ')
}

/// The words of `line`, and where each begins.
fn words(line: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_quoted = false;
    let pieces = line.split(move |character: char| {
        is_quoted ^= character == '"';
        !is_quoted && is_space(character)
    });
    let mut at = 0usize;
    let placed = pieces.map(move |piece| {
        let start = at;
        // White space is one byte.
        at = at.saturating_add(piece.len()).saturating_add(1);
        (start, piece)
    });
    placed.filter(|(_, piece)| !piece.is_empty())
}

/// The parameters in `line`, without the quotes around one of them or around its value.
pub fn parameters(line: &str) -> impl Iterator<Item = String> + '_ {
    words(line).map(|(_, word)| without_quotes(word))
}

fn without_quotes(word: &str) -> String {
    let inner = |text: &str| text.strip_suffix('"').unwrap_or(text).to_owned();
    if let Some(rest) = word.strip_prefix('"') {
        return inner(rest);
    }
    match word.split_once('=') {
        Some((name, value)) => match value.strip_prefix('"') {
            Some(rest) => format!("{name}={}", inner(rest)),
            None => word.to_owned(),
        },
        None => word.to_owned(),
    }
}

/// What of `line` is for the kernel, and what is for init.
pub fn split(line: &str) -> (&str, &str) {
    let end = words(line).find(|(_, word)| without_quotes(word) == "--");
    let (kernel, init) = match end {
        Some((at, word)) => {
            let (kernel, rest) = line.split_at(at);
            (kernel, rest.get(word.len()..).unwrap_or_default())
        }
        None => (line, ""),
    };
    (kernel.trim_matches(is_space), init.trim_matches(is_space))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_when_they_have_quotes_are_as_linux_reads_them() {
        for (line, expected) in [
            ("", &[][..]),
            ("  a  b=c\t\nd ", &["a", "b=c", "d"]),
            ("a\u{b}b", &["a", "b"]),
            ("a=\"b c\" d", &["a=b c", "d"]),
            ("\"a=b c\" d", &["a=b c", "d"]),
            ("a=b\"c d\"e f", &["a=b\"c d\"e", "f"]),
            ("a=\"b", &["a=b"]),
            ("\"", &[""]),
            ("=\"\" é=\"ü ö\"", &["=", "é=ü ö"]),
        ] {
            let found: Vec<String> = parameters(line).collect();
            assert_eq!(found, expected, "{line}");
        }
    }

    #[test]
    fn split_when_two_dashes_are_a_word_of_their_own_gives_init_what_is_behind() {
        for (line, kernel, init) in [
            ("", "", ""),
            (" a  b ", "a  b", ""),
            ("a -- b  -- c ", "a", "b  -- c"),
            ("-- a", "", "a"),
            ("a --", "a", ""),
            ("a\t--\nb", "a", "b"),
            ("\"--\" a", "", "a"),
            ("a=\" -- \" -- é", "a=\" -- \"", "é"),
            ("a=\" -- b", "a=\" -- b", ""),
            ("--a a-- x=--", "--a a-- x=--", ""),
        ] {
            assert_eq!(split(line), (kernel, init), "{line:?}");
        }
    }
}
