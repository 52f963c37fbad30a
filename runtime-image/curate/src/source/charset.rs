//! Bytes of a page to characters, in the encoding that the page says.

use encoding_rs::{Encoding, UTF_8};

/// Bytes at the start of a page in which it may name its encoding.
const HEAD_BYTES: usize = 4096;

/// The text of `body`: UTF-8 if it is, else what its byte order mark, `media_type` or a `<meta>` says. `None` if more than
/// one character of a hundred cannot be read so.
pub(super) fn decode(body: Vec<u8>, media_type: &str) -> Option<String> {
    let encoding = Encoding::for_bom(&body)
        .map(|(encoding, _)| encoding)
        .or_else(|| named(media_type))
        .or_else(|| in_meta(&body));
    let body = match encoding {
        // Many pages are UTF-8 whatever they say.
        None => String::from_utf8(body),
        Some(encoding) if encoding.is_ascii_compatible() => String::from_utf8(body),
        Some(encoding) => return readable(&encoding.decode(&body).0),
    };
    match body {
        Ok(text) => Some(text.trim_start_matches('\u{feff}').to_owned()),
        Err(error) => readable(&encoding.unwrap_or(UTF_8).decode(error.as_bytes()).0),
    }
}

fn readable(text: &str) -> Option<String> {
    let broken = text.matches(char::REPLACEMENT_CHARACTER).count();
    (broken * 100 <= text.chars().count()).then(|| text.to_owned())
}

/// The encoding in `charset=LABEL`, if `text` has that and it is known.
fn named(text: &str) -> Option<&'static Encoding> {
    let text = text.to_ascii_lowercase();
    let (_, label) = text.split_once("charset")?;
    let label = label
        .trim_start()
        .strip_prefix('=')?
        .trim_start()
        .trim_start_matches(['"', '\'']);
    let end = label.find(['"', '\'', ';', ' ', '/', '>']).unwrap_or(label.len());
    Encoding::for_label(&label.as_bytes()[..end])
}

fn in_meta(body: &[u8]) -> Option<&'static Encoding> {
    let head = String::from_utf8_lossy(&body[..body.len().min(HEAD_BYTES)]).to_ascii_lowercase();
    let tags = head.split("<meta").skip(1);
    let mut found = tags.filter_map(|tag| named(tag.split('>').next().unwrap_or_default()));
    // A tag that can be read byte by byte is not in UTF-16, whatever it says.
    found.next().map(Encoding::output_encoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_in_the_encoding_that_it_says() {
        let utf16: Vec<u8> = "\u{feff}Käse".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let cases: [(&[u8], &str, &str); 9] = [
            (b"Gr\xfc\xdfe", "text/html; charset=ISO-8859-1", "Grüße"),
            (b"\xe0\xff", "text/html;charset=\"iso-8859-13\"", "ą’"),
            (b"<meta charset=iso-8859-15>\xa4 5", "", "<meta charset=iso-8859-15>€ 5"),
            (
                b"<META http-equiv=x content='text/html; charset = koi8-r'>\xed\xe9\xf2",
                "text/html",
                "<META http-equiv=x content='text/html; charset = koi8-r'>МИР",
            ),
            (b"\x82\xb1\x82\xcc", "text/html; charset=Shift_JIS", "この"),
            ("schön".as_bytes(), "text/html; charset=iso-8859-1", "schön"),
            (b"\xef\xbb\xbfbom", "", "bom"),
            (&utf16, "", "Käse"),
            (b"<meta charset=utf-16>x", "", "<meta charset=utf-16>x"),
        ];
        for (body, media_type, text) in cases {
            assert_eq!(decode(body.to_vec(), media_type).as_deref(), Some(text), "{media_type}");
        }
    }

    #[test]
    fn a_few_broken_bytes_cost_their_characters_and_many_the_page() {
        let body = [b"x".repeat(200), b"\xff".to_vec()].concat();
        let text = format!("{}\u{fffd}", "x".repeat(200));
        assert_eq!(decode(body, ""), Some(text));
        assert_eq!(decode(b"na\xefve".to_vec(), ""), None);
        assert_eq!(decode(b"na\xefve".to_vec(), "text/html; charset=utf-8"), None);
        assert_eq!(decode(b"text".to_vec(), "text/html; charset=iso-2022-kr"), None);
    }
}
