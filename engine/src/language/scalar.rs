//! Small values written as text: YAML's plain scalars, durations and sizes.
//! Knows no places. The rules for plain scalars are those of YAML 1.2's core
//! schema as `serde_yaml` applies them (`yes` is text; `007` is text).

use std::time::Duration;

use serde_json::Number;

use super::node::Data;

/// The value of a plain scalar.
///
/// # Errors
/// A number that cannot be held exactly enough to be hashed and shown.
pub(crate) fn plain(text: &str) -> Result<Data, String> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Data::Null),
        "true" | "True" | "TRUE" => return Ok(Data::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(Data::Bool(false)),
        _ => {}
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Ok(Data::Text(text.into()));
    }
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return Err(format!("`{text}` is not a finite number"));
    }
    if let Some(number) = integer(text, unsigned) {
        let too_large = || format!("`{text}` is too large for a whole number");
        return number.map(Data::Number).ok_or_else(too_large);
    }
    if !is_float(unsigned) {
        return Ok(Data::Text(text.into()));
    }
    let number = text.parse::<f64>().ok().and_then(Number::from_f64);
    number
        .map(Data::Number)
        .ok_or_else(|| format!("`{text}` is not a finite number"))
}

/// None: not a whole number. Some(None): one that does not fit into 64 bits.
fn integer(text: &str, unsigned: &str) -> Option<Option<Number>> {
    let negative = text.starts_with('-');
    let (digits, radix) = match unsigned.get(..2) {
        Some("0x") => (&unsigned[2..], 16),
        Some("0o") => (&unsigned[2..], 8),
        Some("0b") => (&unsigned[2..], 2),
        _ => (unsigned, 10),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return None;
    }
    if radix == 10 && digits.len() > 1 && digits.starts_with('0') {
        return None;
    }
    let Ok(size) = u64::from_str_radix(digits, radix) else {
        return Some(None);
    };
    Some(if negative {
        0_i64.checked_sub_unsigned(size).map(Number::from)
    } else {
        Some(Number::from(size))
    })
}

/// Digits with a point or an exponent.
fn is_float(text: &str) -> bool {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (text, None),
    };
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = |t: &str| t.bytes().all(|b| b.is_ascii_digit());
    let exponent_ok = exponent.is_none_or(|e| {
        let e = e.strip_prefix(['+', '-']).unwrap_or(e);
        !e.is_empty() && digits(e)
    });
    let written = mantissa.contains('.') || exponent.is_some();
    written && exponent_ok && digits(whole) && digits(part) && whole.len() + part.len() > 0
}

/// A duration: `500ms`, `2s`, `30m`, `1h30m`, `1d`.
///
/// # Errors
/// Text in another form.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a duration");
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(end);
        let unit_end = tail
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = tail;
    }
    if total.is_zero() {
        Err(wrong())
    } else {
        Ok(total)
    }
}

/// A size in bytes: `512MB`, `4GB` (powers of 1000), `4GiB` (powers of 1024).
///
/// # Errors
/// Text in another form.
pub fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size");
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(wrong)?;
    let (number, unit) = text.split_at(end);
    let unit: u64 = match unit.trim_start() {
        "B" => 1,
        "KB" | "kB" => 1000,
        "MB" => 1000_u64.pow(2),
        "GB" => 1000_u64.pow(3),
        "TB" => 1000_u64.pow(4),
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(wrong()),
    };
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let size = number * unit as f64;
    if size < 1.0 || size >= 2_f64.powi(63) {
        Err(wrong())
    } else {
        Ok(size as u64)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_and_sizes() {
        assert_eq!(duration("2s").unwrap(), Duration::from_secs(2));
        assert_eq!(duration("1h30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("1.5m").unwrap(), Duration::from_secs(90));
        for wrong in [
            "",
            "2",
            "s",
            "2x",
            "-2s",
            "2 s",
            "0s",
            "1e99d",
            "99999999999999999999d",
        ] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
        assert_eq!(bytes("4GB").unwrap(), 4_000_000_000);
        assert_eq!(bytes("4GiB").unwrap(), 4 << 30);
        assert_eq!(bytes("1.5KB").unwrap(), 1500);
        for wrong in ["", "4", "GB", "4gb", "-4GB", "0B", "9999999999TB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_that_cannot_be_held() {
        for wrong in [
            "99999999999999999999",
            "-9223372036854775809",
            ".inf",
            "-.inf",
            ".nan",
            "1e999",
        ] {
            assert!(plain(wrong).is_err(), "{wrong}");
        }
        assert_eq!(
            plain("-9223372036854775808"),
            Ok(Data::Number(i64::MIN.into()))
        );
        assert_eq!(
            plain("18446744073709551615"),
            Ok(Data::Number(u64::MAX.into()))
        );
    }
}
