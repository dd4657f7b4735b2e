//! Sizes and durations as people write and read them.

use std::time::Duration;

/// A size in bytes from text such as `512M`, `1GiB` or `4096`. `K`, `M`, `G` and `T` are powers of 1024, as `KiB`
/// and so on are; `kB`, `MB` and so on are powers of 1000.
///
/// # Errors
/// What is wrong with the text.
pub fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let binary = match text.as_bytes() {
        [.., digit, b'K' | b'M' | b'G' | b'T'] if digit.is_ascii_digit() => format!("{text}iB"),
        _ => text.to_owned(),
    };
    let size: bytesize::ByteSize =
        binary.parse().map_err(|_| format!("{text:?} is not a size: write for instance 512MiB or 1GiB"))?;
    Ok(size.as_u64())
}

/// A duration from text such as `50ms`, `10s` or `5m`.
///
/// # Errors
/// What is wrong with the text.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text.trim())
        .map_err(|_| format!("{text:?} is not a duration: write for instance 50ms, 10s or 5m"))
}

/// Bytes a second from text such as `2Gbit/s`, `250MB/s`, `100MiB/s` or `0`, which is no limit. Bits are counted in powers of
/// 1000, as links are; bytes as in [`size`].
///
/// # Errors
/// What is wrong with the text.
pub fn bandwidth(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("{text:?} is not a bandwidth: write for instance 2Gbit/s, 250MB/s, or 0 for no limit");
    let amount = text.trim();
    if amount == "0" {
        return Ok(0);
    }
    let amount = amount.strip_suffix("/s").ok_or_else(wrong)?;
    let Some(bits) = amount.strip_suffix("bit") else { return size(amount).map_err(|_| wrong()) };
    let (number, factor) = match bits.as_bytes() {
        [number @ .., b'k'] => (number.len(), 1e3),
        [number @ .., b'M'] => (number.len(), 1e6),
        [number @ .., b'G'] => (number.len(), 1e9),
        _ => (bits.len(), 1.0),
    };
    let number: f64 = bits[..number].trim().parse().map_err(|_| wrong())?;
    let bytes = number * factor / 8.0;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within the range that was checked"
    )]
    let whole = (0.0..1e15).contains(&bytes).then_some(bytes as u64);
    whole.ok_or_else(wrong)
}

/// Bytes for people: `12.5 MiB`.
pub fn show_bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// Microseconds for people: `850 us`, `12.3 ms`, `4.56 s`.
pub fn show_us(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// Bytes per second for people: `640 MB/s`, in powers of 1000 as links are measured.
pub fn show_rate(bytes_per_s: u64) -> String {
    format!("{}/s", bytesize::ByteSize(bytes_per_s).display().si())
}

/// The value of `NAME: VALUE kB` in /proc/meminfo, in bytes (proc(5)).
pub fn meminfo_bytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4096", 4096),
            ("64K", 64 << 10),
            ("768M", 768 << 20),
            ("1GiB", 1 << 30),
            ("1 GiB", 1 << 30),
            ("2T", 2 << 40),
            ("1GB", 1_000_000_000),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1G", "ten", "1.5.2G", "1XB"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bandwidths_are_read_in_bits_and_bytes() {
        for (text, bytes) in [
            ("0", 0),
            ("2Gbit/s", 250_000_000),
            ("2.5 Gbit/s", 312_500_000),
            ("800Mbit/s", 100_000_000),
            ("64kbit/s", 8000),
            ("80bit/s", 10),
            ("250MB/s", 250_000_000),
            ("1MiB/s", 1 << 20),
        ] {
            assert_eq!(bandwidth(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "2G",
            "2Gbit",
            "Gbit/s",
            "-1Mbit/s",
            "inf Gbit/s",
            "NaNbit/s",
            "1e300Gbit/s",
            "1Tbit/s",
            "5/s/s",
        ] {
            assert!(bandwidth(text).unwrap_err().contains("2Gbit/s"), "{text}");
        }
    }

    #[test]
    fn durations_are_read_and_shown() {
        assert_eq!(duration("50ms"), Ok(Duration::from_millis(50)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert!(duration("50").is_err());
        assert_eq!(show_us(850), "850 us");
        assert_eq!(show_us(12_345), "12.3 ms");
        assert_eq!(show_us(4_560_000), "4.56 s");
    }

    #[test]
    fn what_the_kernel_says_of_memory_is_understood_and_nothing_else_is() {
        let text = "MemTotal:       24 kB\nMemAvailable:   7 kB\nHugePages_Total:       3\n";
        assert_eq!(meminfo_bytes(text, "MemAvailable"), Some(7 << 10));
        for name in ["HugePages_Total", "Mem", "Swap"] {
            assert_eq!(meminfo_bytes(text, name), None, "{name}");
        }
        for value in ["-1 kB", "18446744073709551615 kB", "x kB", "7 MB", ""] {
            assert_eq!(meminfo_bytes(&format!("A: {value}"), "A"), None, "{value:?}");
        }
    }
}
