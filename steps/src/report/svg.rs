//! The few SVG elements that the charts are made of.
//!
//! Knows no chart. Invariant: every text that is written into an element is escaped here.

use std::fmt::Write as _;

/// A share for drawing: what is not a number is drawn as nothing.
pub(super) fn share(value: f64) -> f64 {
    if value.is_finite() {
        value.clamp(0.0, 1.0)
    } else {
        0.0
    }
}

pub(super) fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

pub(super) fn escape(text: &str) -> String {
    tera::escape_html(text)
}

/// Opens an SVG that scales down to a phone and never up past a quarter more than its size.
pub(super) fn open(out: &mut String, width: f64, height: f64, name: &str, min_width: f64) {
    let name = escape(name);
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" aria-label=\"{name}\" \
         style=\"min-width:{min_width:.0}px;max-width:{:.0}px\">",
        width * 1.25
    );
}

pub(super) fn line(out: &mut String, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = write!(
        out,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

pub(super) fn text(out: &mut String, class: &str, (x, y): (f64, f64), words: &str) {
    let words = escape(words);
    let _ = write!(
        out,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"
    );
}

/// A rectangle with a tooltip.
pub(super) fn rect(out: &mut String, class: &str, at: (f64, f64), size: (f64, f64), tip: &str) {
    let ((x, y), (w, h), tip) = (at, size, escape(tip));
    let _ = write!(
        out,
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\">\
         <title>{tip}</title></rect>"
    );
}

/// At most `max` characters, with an ellipsis where something was cut.
pub(super) fn clip(text: &str, max: usize) -> String {
    if text.chars().count() <= max {
        return text.to_owned();
    }
    text.chars()
        .take(max.saturating_sub(1))
        .chain(['…'])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clip_counts_characters() {
        assert_eq!(clip("äöü", 3), "äöü");
        assert_eq!(clip("äöüß", 3), "äö…");
    }
}
