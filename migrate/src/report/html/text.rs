//! Text that becomes part of a page: whatever it is, it stays text.

use std::fmt;

/// The longest text that is shown, in characters; what is behind is cut.
const LONGEST: usize = 2000;

/// A text of anybody's, fit for an element or a quoted attribute: what means something in HTML is escaped, and what a
/// reader could not see or would be misled by (control characters, changes of direction) is replaced.
pub(super) struct Text<T>(pub(super) T);

impl<T: fmt::Display> fmt::Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let mut characters = text.chars();
        for character in characters.by_ref().take(LONGEST) {
            match character {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                '\n' | '\t' => f.write_str(" ")?,
                // Marks that change the direction of what follows (Unicode UAX #9).
                '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                    f.write_str("\u{fffd}")?;
                }
                other if other.is_control() => f.write_str("\u{fffd}")?,
                other => fmt::Write::write_char(f, other)?,
            }
        }
        if characters.next().is_some() { f.write_str("…") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_text_can_end_it() {
        let hostile = "<script>alert('x')</script>\" onload=\"&\u{0}\u{1b}\u{202e}";
        let shown = Text(hostile).to_string();
        assert!(shown.chars().all(|c| !"<>\"'".contains(c) && !c.is_control()), "{shown}");
        assert!(shown.starts_with("&lt;script&gt;") && shown.contains("&amp;"), "{shown}");
        assert_eq!(Text("x".repeat(3000)).to_string().chars().count(), LONGEST + 1);
    }
}
