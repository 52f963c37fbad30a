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
        static EMAIL: LazyLock<Regex> = LazyLock::new(|| {
            compile(
                r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}",
            )
        });
        // With a country code: "+49 30 1234567", "+1 (555) 010-9999". Without: North American numbers with separators.
        static PHONE: LazyLock<Regex> = LazyLock::new(|| {
            compile(
                r"\+[1-9][0-9]{0,2}(?:[ .\-/]?\(?[0-9]{1,4}\)?){2,6}|\(?[2-9][0-9]{2}\)?[ .\-][0-9]{3}[ .\-][0-9]{4}",
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

    /// Whether what the pattern found in `text` is one.
    fn accepts(self, text: &str, found: Range<usize>) -> bool {
        let before = text[..found.start].chars().next_back();
        let mut after = text[found.end..].chars();
        let (next, second) = (after.next(), after.next());
        // Part of a longer number, identifier, version or sum is none.
        let joined = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '-' | '+' | '/' | '=' | ':');
        let ends_sentence = matches!(next, Some('.' | ':' | '-' | '/')) && second.is_none_or(|c| !c.is_alphanumeric());
        let apart = before.is_none_or(|c| !joined(c) || (c == ':' && self != Self::IpAddress))
            && (next.is_none_or(|c| !joined(c)) || ends_sentence);
        let span = &text[found];
        match self {
            Self::Email => true,
            Self::Phone => {
                let digits = span.bytes().filter(u8::is_ascii_digit).count();
                let least = if span.starts_with('+') { 8 } else { 10 };
                apart && (least..=15).contains(&digits)
            }
            Self::IpAddress => apart && span.parse().is_ok_and(is_public),
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
        ] {
            assert_eq!(find(text), [], "{text}");
        }
    }
}
