//! Numbers with units, three significant digits at most.

/// `1.4 GB`; powers of ten, as disks are sold.
pub fn human_bytes(bytes: u64) -> String {
    match bytes {
        0..1000 => format!("{bytes} B"),
        _ => scaled(bytes as f64, &["kB", "MB", "GB", "TB", "PB"]),
    }
}

/// `3.1 M`.
pub fn human_count(n: u64) -> String {
    match n {
        0..10_000 => n.to_string(),
        _ => scaled(n as f64, &["k", "M", "G", "T", "P"]),
    }
}

/// `6.3 PFLOP`.
pub fn human_flops(flops: f64) -> String {
    if flops < 1e3 {
        return format!("{flops:.0} FLOP");
    }
    scaled(flops, &["kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP"])
}

/// `0.4 s`, `2 min 05 s`, `3 h 10 min`.
pub fn human_secs(secs: f64) -> String {
    if !secs.is_finite() || secs < 0.0 {
        return "-".to_owned();
    }
    if secs < 9.95 {
        return format!("{secs:.1} s");
    }
    let whole = secs.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3600..172_800 => {
            let minutes = (secs / 60.0).round() as u64;
            format!("{} h {:02} min", minutes / 60, minutes % 60)
        }
        _ => format!("{:.1} days", secs / 86_400.0),
    }
}

/// `value` over the power of 1000 that leaves it in [1, 1000), with its unit; `value` is at least 1000.
fn scaled(value: f64, units: &[&str]) -> String {
    let mut value = value / 1000.0;
    let mut unit = 0;
    // Rounding to three digits must not show `1000 MB`.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_the_fitting_unit() {
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(999_999), "1.00 MB");
        assert_eq!(human_bytes(16_060_000_000), "16.1 GB");
        assert_eq!(human_count(9_999), "9999");
        assert_eq!(human_count(2_840_000), "2.84 M");
        assert_eq!(human_flops(6.33e15), "6.33 PFLOP");
        assert_eq!(human_flops(12.0), "12 FLOP");
    }

    #[test]
    fn times_round_upwards_into_the_next_unit() {
        assert_eq!(human_secs(0.04), "0.0 s");
        assert_eq!(human_secs(9.97), "10 s");
        assert_eq!(human_secs(59.6), "1 min 00 s");
        assert_eq!(human_secs(125.2), "2 min 05 s");
        assert_eq!(human_secs(3599.9), "1 h 00 min");
        assert_eq!(human_secs(400_000.0), "4.6 days");
        assert_eq!(human_secs(f64::NAN), "-");
    }
}
