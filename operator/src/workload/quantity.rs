//! Kubernetes quantities as numbers: the server rewrites them (`1024Mi` becomes `1Gi`), so texts cannot be compared.

/// The value of a quantity such as `500m`, `1Gi`, `2e3`; `None` if it is none.
pub fn parse(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let (number, scale) = SUFFIXES
        .iter()
        .find_map(|(suffix, scale)| Some((text.strip_suffix(suffix)?, *scale)))
        .unwrap_or((text, 1.0));
    let plain = !number.is_empty() && number.chars().all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
    let value: f64 = number.parse().ok().filter(|_| plain)?;
    Some(value * scale)
}

/// A quantity of bytes, rounded up; `None` if it is no quantity or negative.
pub fn bytes(text: &str) -> Option<u64> {
    parse(text)
        .filter(|value| (0.0..9e18).contains(value))
        .map(|value| value.ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_the_server_reads_them() {
        for (text, value) in [
            ("1", Some(1.0)),
            ("500m", Some(0.5)),
            ("0.5", Some(0.5)),
            ("1024Mi", Some(1_073_741_824.0)),
            ("1Gi", Some(1_073_741_824.0)),
            ("2e3", Some(2000.0)),
            ("1E", Some(1e18)),
            ("", None),
            ("Gi", None),
            ("ten", None),
            ("inf", None),
        ] {
            assert_eq!(parse(text), value, "{text}");
        }
        assert_eq!(bytes("256Mi"), Some(256 << 20));
        assert_eq!(bytes("-1"), None);
    }
}
