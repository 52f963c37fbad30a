//! The live table: drawn over itself on a terminal, a line per change elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

/// Widest message in characters.
const MESSAGE_WIDTH: usize = 72;

/// One resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) ready: String,
    pub(super) reason: String,
    pub(super) message: String,
    pub(super) percent: Option<i32>,
    pub(super) activity: String,
}

impl Row {
    fn text(&self) -> String {
        let progress = match self.percent {
            Some(percent) if self.ready != "True" => format!("{percent:>3}% {}", self.activity),
            _ => String::new(),
        };
        let message: String = self
            .message
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(MESSAGE_WIDTH)
            .collect();
        format!(
            "{:<28} {:<8} {:<20} {:<18} {message}",
            self.name, self.ready, self.reason, progress
        )
    }

    /// What makes a new line worth printing where the table cannot be drawn over: a tenth of progress counts.
    fn key(&self) -> (String, String, Option<i32>) {
        (
            self.ready.clone(),
            self.reason.clone(),
            self.percent.map(|percent| percent / 10),
        )
    }
}

/// Columns of the terminal; none where it cannot say. Asked at each draw: a person may change it.
fn columns() -> Option<usize> {
    // SAFETY: a zeroed winsize is a valid value for the kernel to fill, and it outlives the call.
    unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        let known = libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) == 0 && size.ws_col > 0;
        known.then_some(usize::from(size.ws_col))
    }
}

/// What was shown last.
#[derive(Debug)]
pub(super) struct Table {
    terminal: bool,
    drawn: usize,
    seen: BTreeMap<String, (String, String, Option<i32>)>,
}

impl Table {
    pub(super) fn new(terminal: bool) -> Self {
        Self {
            terminal,
            drawn: 0,
            seen: BTreeMap::new(),
        }
    }

    pub(super) fn show(&mut self, rows: &[Row], elapsed: Duration) {
        let clock = format!("{:>2}:{:02}", elapsed.as_secs() / 60, elapsed.as_secs() % 60);
        if self.terminal {
            if self.drawn > 0 {
                // Up to the first drawn line, and clear from there.
                super::print_piece(&format!("\x1b[{}F\x1b[J", self.drawn));
            }
            let head = format!(
                "{:<28} {:<8} {:<20} {:<18} {clock}",
                "NAME", "READY", "REASON", "PROGRESS"
            );
            // A line that wraps is two lines on the screen, and the next draw would not go up far enough.
            let width = columns().unwrap_or(usize::MAX);
            for line in std::iter::once(head).chain(rows.iter().map(Row::text)) {
                super::shell_line(&line.chars().take(width).collect::<String>());
            }
            self.drawn = rows.len() + 1;
            return;
        }
        for row in rows {
            if self.seen.insert(row.name.clone(), row.key()).as_ref() != Some(&row.key()) {
                super::shell_line(&format!("{clock}  {}", row.text()));
            }
        }
    }
}
