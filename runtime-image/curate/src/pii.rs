//! Personal data in text: e-mail addresses, phone numbers, public IP addresses. Precision first: a number is a phone
//! number only if it is written as one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

/// A type of personal data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PiiKind {
    Email,
    Phone,
    IpAddress,
}

impl PiiKind {
    pub(crate) const ALL: [Self; 3] = [Self::Email, Self::Phone, Self::IpAddress];

    /// What a span is replaced by.
    fn tag(self) -> &'static str {
        match self {
            Self::Email => "<EMAIL>",
            Self::Phone => "<PHONE>",
            Self::IpAddress => "<IP_ADDRESS>",
        }
    }

    /// Name in figures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Email => "email",
            Self::Phone => "phone",
            Self::IpAddress => "ipAddress",
        }
    }

    fn pattern(self) -> &'static Regex {
        // Letters of scripts that write spaces: in others a name and the words before it would be one.
        static EMAIL: LazyLock<Regex> = LazyLock::new(|| {
            let letter = r"\p{Latin}\p{Greek}\p{Cyrillic}\p{M}0-9";
            compile(&format!(
                r"[{letter}][{letter}.'’_%+-]*@[{letter}-]+(?:\.[{letter}-]+)*\.[A-Za-z]{{2,24}}"
            ))
        });
        // With a country code: "+49 30 1234567", "+1 (555) 010-9999". Without: North American numbers with separators.
        static PHONE: LazyLock<Regex> = LazyLock::new(|| {
            compile(
                r"\+[1-9][0-9]{0,2}(?:[ .\-/]?\(?[0-9]{1,4}\)?){2,6}|(?:\b1[ .\-])?\(?[2-9][0-9]{2}\)?[ .\-][0-9]{3}[ .\-][0-9]{4}",
            )
        });
        static ADDRESS: LazyLock<Regex> =
            LazyLock::new(|| compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}"));
        match self {
            Self::Email => &EMAIL,
            Self::Phone => &PHONE,
            Self::IpAddress => &ADDRESS,
        }
    }

    /// Whether what the pattern found in `text` is one, and not part of a longer number, identifier, version or sum.
    fn accepts(self, text: &str, found: Range<usize>) -> bool {
        let span = &text[found.clone()];
        let (before, after) = (&text[..found.start], &text[found.end..]);
        let v6 = span.contains(':');
        let starts = match before.chars().next_back() {
            // Of a path only the host is an address: "http://203.0.113.7/", not "lib/1.2.3.4/".
            Some('/') => self == Self::IpAddress && before.ends_with("//"),
            Some(':') => !v6,
            Some(c) => !c.is_alphanumeric() && !matches!(c, '_' | '.' | '-' | '+'),
            None => true,
        };
        let mut next = after.chars();
        let ends = match (next.next(), next.next().is_some_and(char::is_alphanumeric)) {
            // A port, a path or a prefix length follows.
            (Some(':'), true) => self == Self::IpAddress && !v6,
            (Some('/'), more) => self == Self::IpAddress || !more,
            (Some('.' | '-' | ':'), more) => !more,
            (Some(c), _) => !c.is_alphanumeric() && !matches!(c, '_' | '+' | '='),
            (None, _) => true,
        };
        match self {
            Self::Email => true,
            Self::Phone => {
                let digits = span.bytes().filter(u8::is_ascii_digit).count();
                let least = if span.starts_with('+') { 8 } else { 10 };
                starts && ends && (least..=15).contains(&digits)
            }
            Self::IpAddress => starts && ends && span.parse().is_ok_and(is_public),
        }
    }
}

fn compile(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is a constant that a test compiles")
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let reserved = v4.octets()[0] == 0 || v4.octets()[0] >= 224;
            !(v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4 == Ipv4Addr::UNSPECIFIED || reserved)
        }
        IpAddr::V6(v6) => {
            let local = matches!(v6.segments()[0] & 0xffc0, 0xfe80) || matches!(v6.segments()[0] & 0xfe00, 0xfc00);
            !(local || v6.is_multicast() || v6 == Ipv6Addr::LOCALHOST || v6.segments()[0] == 0)
        }
    }
}

/// The spans of personal data in `text`, in order, none overlapping.
pub(crate) fn find(text: &str) -> Vec<(PiiKind, Range<usize>)> {
    let mut found: Vec<(PiiKind, Range<usize>)> = PiiKind::ALL
        .into_iter()
        .flat_map(|kind| kind.pattern().find_iter(text).map(move |hit| (kind, hit.range())))
        .filter(|(kind, range)| kind.accepts(text, range.clone()))
        .collect();
    found.sort_by_key(|(kind, range)| (range.start, *kind));
    let mut end = 0;
    found.retain(|(_, range)| {
        let free = range.start >= end;
        if free {
            end = range.end;
        }
        free
    });
    found
}

/// `text` with each of `spans` (as [`find`] gives them) replaced by the tag of its type.
pub(crate) fn redact(text: &str, spans: &[(PiiKind, Range<usize>)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    for (kind, range) in spans {
        out.push_str(&text[at..range.start]);
        out.push_str(kind.tag());
        at = range.end;
    }
    out.push_str(&text[at..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn personal_data_is_redacted_and_other_numbers_are_not() {
        for (text, redacted) in [
            ("Write to box.office@globe-players.example.org.", "Write to <EMAIL>."),
            (
                "Call +44 20 7946 0958 or (555) 010-9999, now",
                "Call <PHONE> or <PHONE>, now",
            ),
            ("tel:555-010-9999; fax +1.555.010.9998.", "tel:<PHONE>; fax <PHONE>."),
            (
                "from 203.0.113.7 and 2001:db8::1, port 80",
                "from <IP_ADDRESS> and <IP_ADDRESS>, port 80",
            ),
            (
                "http://203.0.113.7/x, 203.0.113.7:8080, ip=203.0.113.7, IP:203.0.113.7, http://[2001:db8::1]:80/",
                "http://<IP_ADDRESS>/x, <IP_ADDRESS>:8080, ip=<IP_ADDRESS>, IP:<IP_ADDRESS>, http://[<IP_ADDRESS>]:80/",
            ),
            (
                "1-555-010-9999, 1-800-555-0199, tel=+44 20 7946 0958",
                "<PHONE>, <PHONE>, tel=<PHONE>",
            ),
            (
                "jörg.müller@bücher.example, иван@театр.example, o'brien@globe.example",
                "<EMAIL>, <EMAIL>, <EMAIL>",
            ),
            ("请写信给bob@globe.example谢谢", "请写信给<EMAIL>谢谢"),
        ] {
            assert_eq!(redact(text, &find(text)), redacted);
        }
        for text in [
            "In 1599-1613, 2,000 came; pages 123-456.",
            "ISBN 978-3-16-148410-0, order 5550109999",
            "192.168.0.1 and 127.0.0.1 and ::1 are local",
            "version 10.2.3.4 of std::fmt at 12:30:45",
            "1.5.255.1.9 is an object identifier; a@b is no address",
            "2 + 1234567 = 1234569",
            "scene 555-010-99991",
            "lib/4.3.2.1/x.js, v4.3.2.1, tool-4.3.2.1, 4.3.2.1-beta",
            "https://globe.example/555-010-9999/1-555-010-9999",
        ] {
            assert_eq!(find(text), [], "{text}");
        }
    }
}
