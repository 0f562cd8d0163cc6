//! [`Parent`]: the span that a run is a part of, as `TRACEPARENT` names it.

use opentelemetry::trace::{SpanId, TraceId};

/// The span that the run is a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parent {
    pub(super) trace: TraceId,
    pub(super) span: SpanId,
    /// The trace is kept at all.
    pub(super) sampled: bool,
}

impl Parent {
    /// A `traceparent` of the W3C's Trace Context: version, trace, span, flags.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let &[version, trace, span, flags, ..] = parts.as_slice() else {
            return None;
        };
        let is_hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
        };
        // Later versions may have further parts, the first has not.
        let known = is_hex(version, 2) && version != "ff" && (version != "00" || parts.len() == 4);
        if !(known && is_hex(trace, 32) && is_hex(span, 16) && is_hex(flags, 2)) {
            return None;
        }
        let parent = Self {
            trace: TraceId::from_hex(trace).ok()?,
            span: SpanId::from_hex(span).ok()?,
            sampled: u8::from_str_radix(flags, 16).ok()? & 1 == 1,
        };
        let valid = parent.trace != TraceId::INVALID && parent.span != SpanId::INVALID;
        valid.then_some(parent)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn a_parent_is_read_and_a_wrong_one_is_none() {
        let parent = Parent::parse(&format!("00-{TRACE}-00f067aa0ba902b7-01")).unwrap();
        assert_eq!(parent.trace.to_string(), TRACE);
        assert_eq!(parent.span.to_string(), "00f067aa0ba902b7");
        assert!(parent.sampled);
        assert!(Parent::parse(&format!("cc-{TRACE}-00f067aa0ba902b7-01-more")).is_some());
        for wrong in [
            String::new(),
            format!("00-{TRACE}-00f067aa0ba902b7"),
            format!("00-{TRACE}-00f067aa0ba902b7-01-more"),
            format!("ff-{TRACE}-00f067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{TRACE}-+0f067aa0ba902b7-01"),
        ] {
            assert!(Parent::parse(&wrong).is_none(), "{wrong}");
        }
    }
}
