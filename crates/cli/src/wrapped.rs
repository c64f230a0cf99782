//! Lines broken between words, to fit a terminal.

use console::measure_text_width;

/// `text` with its lines broken between words so that none is longer than `width` columns, if it can be; what
/// follows a break is indented by `indent`. Commands and paths in backquotes stay whole, and changes of color
/// take no room.
pub fn wrapped(text: &str, width: usize, indent: usize) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for line in text.split_inclusive('\n') {
        let (mut at, mut is_code) = (0, false);
        for (i, word) in line
            .split_inclusive(|c| {
                is_code ^= c == '`';
                c == ' ' && !is_code
            })
            .enumerate()
        {
            let (room, all) = (measure_text_width(word.trim_end()), measure_text_width(word));
            if i > 0 && at > indent && at + room > width {
                out.truncate(out.trim_end_matches(' ').len());
                out.push('\n');
                out.extend(std::iter::repeat_n(' ', indent));
                at = indent;
            }
            out.push_str(word);
            at += all;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_a_terminal_and_commands_stay_whole() {
        let text =
            "\u{1b}[32m INFO\u{1b}[0m the words of a line, and `a command --with options` at its end\n";
        let broken = "\u{1b}[32m INFO\u{1b}[0m the words of a\n      line, and\n      `a command --with options`\n      at its end\n";
        assert_eq!(wrapped(text, 20, 6), broken);
        assert_eq!(wrapped(text, 80, 6), text);
        assert_eq!(wrapped("one two `a b`\nc\n", 10, 2), "one two\n  `a b`\nc\n");
        assert_eq!(wrapped("漢字漢字 漢字\n", 10, 2), "漢字漢字\n  漢字\n");
        assert_eq!(wrapped("a\n\n  indented\n", 4, 2), "a\n\n  indented\n");
    }
}
