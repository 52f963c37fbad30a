//! Which language a text is in: trigram profiles of 70 languages (whatlang).

use whatlang::Lang;

/// Bytes of a text that are looked at; more do not change the answer.
const SAMPLE_BYTES: usize = 32 * 1024;

/// The identified languages, by ISO 639-1 code where there is one, else 639-3.
const LANGUAGES: [(Lang, &str); 70] = {
    use Lang::*;
    [
        (Epo, "eo"),
        (Eng, "en"),
        (Rus, "ru"),
        (Cmn, "zh"),
        (Spa, "es"),
        (Por, "pt"),
        (Ita, "it"),
        (Ben, "bn"),
        (Fra, "fr"),
        (Deu, "de"),
        (Ukr, "uk"),
        (Kat, "ka"),
        (Ara, "ar"),
        (Hin, "hi"),
        (Jpn, "ja"),
        (Heb, "he"),
        (Yid, "yi"),
        (Pol, "pl"),
        (Amh, "am"),
        (Jav, "jv"),
        (Kor, "ko"),
        (Nob, "nb"),
        (Dan, "da"),
        (Swe, "sv"),
        (Fin, "fi"),
        (Tur, "tr"),
        (Nld, "nl"),
        (Hun, "hu"),
        (Ces, "cs"),
        (Ell, "el"),
        (Bul, "bg"),
        (Bel, "be"),
        (Mar, "mr"),
        (Kan, "kn"),
        (Ron, "ro"),
        (Slv, "sl"),
        (Hrv, "hr"),
        (Srp, "sr"),
        (Mkd, "mk"),
        (Lit, "lt"),
        (Lav, "lv"),
        (Est, "et"),
        (Tam, "ta"),
        (Vie, "vi"),
        (Urd, "ur"),
        (Tha, "th"),
        (Guj, "gu"),
        (Uzb, "uz"),
        (Pan, "pa"),
        (Aze, "az"),
        (Ind, "id"),
        (Tel, "te"),
        (Pes, "fa"),
        (Mal, "ml"),
        (Ori, "or"),
        (Mya, "my"),
        (Nep, "ne"),
        (Sin, "si"),
        (Khm, "km"),
        (Tuk, "tk"),
        (Aka, "ak"),
        (Zul, "zu"),
        (Sna, "sn"),
        (Afr, "af"),
        (Lat, "la"),
        (Slk, "sk"),
        (Cat, "ca"),
        (Tgl, "tl"),
        (Hye, "hy"),
        (Cym, "cy"),
    ]
};

/// A language and how sure the identification is, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Identified {
    /// Code of the closest of the known languages; `und` if the text has none of their scripts.
    pub(crate) code: &'static str,
    /// How far it is ahead of the second closest.
    pub(crate) confidence: f64,
}

/// The closest of the known languages. A text in another language gets a neighbour of it, with less confidence.
pub(crate) fn identify(text: &str) -> Identified {
    let end = (0..=SAMPLE_BYTES.min(text.len()))
        .rev()
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(0);
    let Some(info) = whatlang::detect(&text[..end]) else {
        return Identified {
            code: "und",
            confidence: 0.0,
        };
    };
    let code = LANGUAGES
        .iter()
        .find(|(lang, _)| *lang == info.lang())
        .map_or("und", |(_, code)| *code);
    Identified {
        code,
        confidence: info.confidence(),
    }
}

/// Whether `code` is one that [`identify`] can answer.
pub(crate) fn is_known(code: &str) -> bool {
    LANGUAGES.iter().any(|(_, known)| *known == code)
}

/// All codes, for a message.
pub(crate) fn known_codes() -> String {
    let mut codes: Vec<&str> = LANGUAGES.iter().map(|(_, code)| *code).collect();
    codes.sort_unstable();
    codes.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_language_of_the_identifier_has_a_code_of_its_own() {
        for lang in Lang::all() {
            assert!(LANGUAGES.iter().any(|(known, _)| known == lang), "{lang:?}");
        }
        let mut codes: Vec<&str> = LANGUAGES.iter().map(|(_, code)| *code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), LANGUAGES.len());
    }

    #[test]
    fn languages_are_told_apart() {
        for (text, code) in [
            (
                "But soft, what light through yonder window breaks? It is the east, and Juliet is the sun.",
                "en",
            ),
            (
                "Ser oder nicht sein, das ist hier die Frage: ob es edler im Gemüt, die Pfeile zu dulden.",
                "de",
            ),
            (
                "Быть или не быть, вот в чём вопрос. Достойно ли смиряться под ударами судьбы?",
                "ru",
            ),
            ("12345 67890", "und"),
        ] {
            assert_eq!(identify(text).code, code, "{text}");
        }
    }
}
