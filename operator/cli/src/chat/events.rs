//! Server-sent events of a streamed answer, from whatever pieces the network makes of them. Pure.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// Longest event; a token's is a few hundred bytes.
const EVENT_LIMIT_BYTES: usize = 1 << 20;

/// What was read and makes no whole line yet.
#[derive(Default)]
pub struct Events {
    pending: Vec<u8>,
    ended: bool,
}

impl Events {
    /// The text in `bytes`, and in what was left of earlier ones.
    pub fn read(&mut self, bytes: &[u8]) -> Result<String> {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        while let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.pending.drain(..=end).collect();
            let line = std::str::from_utf8(&line).context("the endpoint does not speak UTF-8")?;
            // Comments and the names of events say nothing here.
            let Some(data) = line.trim_end().strip_prefix("data:").map(str::trim_start) else {
                continue;
            };
            if data == "[DONE]" {
                self.ended = true;
                continue;
            }
            let event: Value = serde_json::from_str(data).with_context(|| format!("no JSON in the event {data:?}"))?;
            if let Some(message) = event["error"]["message"].as_str() {
                bail!("the endpoint ended the answer: {message}");
            }
            text.push_str(event["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
        }
        if self.pending.len() > EVENT_LIMIT_BYTES {
            bail!("the endpoint sent an event of more than {EVENT_LIMIT_BYTES} bytes");
        }
        Ok(text)
    }

    /// Whether the answer is whole.
    pub fn ended(&self) -> bool {
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_the_same_however_it_is_cut() {
        let stream = ": ping\r\n\ndata: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n\
                      data: {\"choices\":[{\"delta\":{\"content\":\"gr\u{fc}\"}}]}\r\n\r\n\
                      data: {\"choices\":[{\"delta\":{\"content\":\"n\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
        for size in [1, 2, 7, stream.len()] {
            let mut events = Events::default();
            let pieces = stream.as_bytes().chunks(size).map(|piece| events.read(piece).unwrap());
            assert_eq!(pieces.collect::<String>(), "gr\u{fc}n", "pieces of {size}");
            assert!(events.ended());
        }
    }

    #[test]
    fn what_is_no_answer_is_said() {
        for (stream, word) in [
            ("data: {\"error\":{\"message\":\"out of blocks\"}}\n", "out of blocks"),
            ("data: {\n", "no JSON"),
            (&"x".repeat(EVENT_LIMIT_BYTES + 1), "more than"),
        ] {
            let said = Events::default().read(stream.as_bytes()).unwrap_err().to_string();
            assert!(said.contains(word), "{said}");
        }
        assert!(!Events::default().ended());
    }
}
