//! From the resources of a namespace to the tree that `status` shows: what waits for what, and what holds it up. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use strata_api::{ProgressStatus, Reason};
use strata_operator::engine::kind::Ref;

use crate::resource::{Item, Ready, Snapshot};

/// One line of the tree.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// `Kind/name`.
    pub resource: String,
    /// Branches before the name.
    #[serde(skip)]
    pub branches: String,
    /// Whether it was shown before, with what hangs on it.
    #[serde(skip)]
    pub again: bool,
    /// The Ready condition; absent if there is no such resource.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<Ready>,
    /// Its reason.
    pub reason: String,
    /// Its message.
    pub message: String,
    /// How far the running attempt is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// Of an InferenceService: pods that answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// Of an InferenceService: all pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Digest of what it published last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// What it waits for.
    pub waits_for: Vec<String>,
    /// What waits for it, near and far, if nothing before it is to blame.
    pub blocks: Vec<String>,
}

/// The tree under `root`, or all trees of the namespace, the ends of the chains first.
pub fn rows(all: &Snapshot, root: Option<&Ref>) -> Vec<Row> {
    let blocked = blocked(all);
    let mut drawing = Drawing {
        all,
        blocked: &blocked,
        drawn: BTreeSet::new(),
        rows: Vec::new(),
    };
    if let Some(root) = root {
        drawing.draw(root, "", "");
        return drawing.rows;
    }
    let referred: BTreeSet<&Ref> = all
        .iter()
        .flat_map(|(name, item)| item.refs.iter().filter(move |to| *to != name))
        .collect();
    let ends = all.keys().rev().filter(|name| !referred.contains(name));
    // What only a circle refers to is no end, and is not forgotten either.
    for name in ends.chain(all.keys().rev()) {
        if !drawing.drawn.contains(name) {
            drawing.draw(name, "", "");
        }
    }
    drawing.rows
}

/// What `item` cannot go on without: resources that have published nothing yet, or do not exist.
fn waits_for<'a>(all: &Snapshot, item: &'a Item) -> Vec<&'a Ref> {
    let missing = |to: &&Ref| all.get(to).is_none_or(|upstream| upstream.digest.is_none());
    match item.has_inputs {
        true => Vec::new(),
        false => item.refs.iter().filter(missing).collect(),
    }
}

/// By what holds it up: everything that waits for it, near and far. Only what waits for nothing itself is to blame.
fn blocked(all: &Snapshot) -> BTreeMap<Ref, BTreeSet<Ref>> {
    let mut waiting: BTreeMap<Ref, BTreeSet<Ref>> = BTreeMap::new();
    for (name, item) in all {
        let mut seen = BTreeSet::new();
        let mut open = waits_for(all, item);
        while let Some(next) = open.pop() {
            if next == name || !seen.insert(next) {
                continue;
            }
            let further = all.get(next).map(|item| waits_for(all, item)).unwrap_or_default();
            if further.is_empty() {
                waiting.entry(next.clone()).or_default().insert(name.clone());
            }
            open.extend(further);
        }
    }
    waiting
}

struct Drawing<'a> {
    all: &'a Snapshot,
    blocked: &'a BTreeMap<Ref, BTreeSet<Ref>>,
    drawn: BTreeSet<Ref>,
    rows: Vec<Row>,
}

impl Drawing<'_> {
    /// Draws `name` behind `branches`, and what it refers to behind `below`.
    fn draw(&mut self, name: &Ref, branches: &str, below: &str) {
        let again = !self.drawn.insert(name.clone());
        self.rows.push(self.row(name, branches, again));
        let Some(item) = self.all.get(name).filter(|_| !again) else {
            return;
        };
        let mut refs = item.refs.clone();
        refs.sort();
        refs.dedup();
        let count = refs.len();
        for (index, to) in refs.iter().enumerate() {
            let (branch, rest) = if index + 1 == count {
                ("└─ ", "   ")
            } else {
                ("├─ ", "│  ")
            };
            self.draw(to, &format!("{below}{branch}"), &format!("{below}{rest}"));
        }
    }

    fn row(&self, name: &Ref, branches: &str, again: bool) -> Row {
        let words = |refs: &mut dyn Iterator<Item = &Ref>| refs.map(ToString::to_string).collect::<Vec<_>>();
        let blocks = words(&mut self.blocked.get(name).into_iter().flatten());
        let row = Row {
            resource: name.to_string(),
            branches: branches.to_owned(),
            again,
            ready: None,
            reason: "NotFound".into(),
            message: "it does not exist (yet): apply it, or correct the name".into(),
            progress: None,
            ready_replicas: None,
            replicas: None,
            digest: None,
            waits_for: Vec::new(),
            blocks,
        };
        let Some(item) = self.all.get(name) else { return row };
        Row {
            ready: Some(item.ready),
            reason: item.reason.clone(),
            message: item.message.clone(),
            progress: item.progress.clone().filter(|_| item.ready != Ready::True),
            ready_replicas: item.replicas.map(|(ready, _)| ready),
            replicas: item.replicas.map(|(_, all)| all),
            digest: item.digest.clone(),
            waits_for: words(&mut waits_for(self.all, item).into_iter()),
            ..row
        }
    }
}

/// The rows as a table, with what a person has to do below it. Lines are cut to `width` where it is known.
pub fn text(rows: &[Row], width: Option<usize>) -> String {
    let cells: Vec<[String; 5]> = rows.iter().map(cells).collect();
    let head = ["NAME", "READY", "REASON", "PROGRESS", "MESSAGE"].map(str::to_owned);
    let widest = |column: usize| {
        let all = std::iter::once(&head).chain(&cells);
        all.map(|cells| cells[column].chars().count()).max().unwrap_or(0)
    };
    let widths = [widest(0), widest(1), widest(2), widest(3)];
    let mut out = String::new();
    for cells in std::iter::once(&head).chain(&cells) {
        let mut line = String::new();
        for (cell, width) in cells.iter().zip(widths) {
            line.push_str(&format!("{cell:<width$}   "));
        }
        line.push_str(&cells[4]);
        out.extend(line.trim_end().chars().take(width.unwrap_or(usize::MAX)));
        out.push('\n');
    }
    for row in rows.iter().filter(|row| !row.again) {
        if let Some(remedy) = remedy(row) {
            out.push_str(&format!("\n{}: {}\n  {remedy}\n", row.resource, row.message));
        }
    }
    out
}

fn cells(row: &Row) -> [String; 5] {
    let name = format!("{}{}", row.branches, row.resource);
    if row.again {
        return [
            name,
            String::new(),
            String::new(),
            String::new(),
            "(shown above)".into(),
        ];
    }
    let progress = match (&row.progress, row.ready_replicas, row.replicas) {
        (Some(progress), ..) => format!("{}% {}", progress.percent, progress.activity),
        (None, Some(ready), Some(all)) if ready > 0 || all > 0 => format!("{ready}/{all} pods"),
        _ => String::new(),
    };
    let said = row.message.lines().next().unwrap_or_default();
    let message = match row.blocks.is_empty() {
        true => said.to_owned(),
        false => format!("blocks {}; {said}", row.blocks.join(", ")),
    };
    let ready = row.ready.map_or_else(|| "-".to_owned(), |ready| ready.to_string());
    [name, ready, row.reason.clone(), progress, message]
}

/// What to do about a resource that needs a person, unless its message says so already.
fn remedy(row: &Row) -> Option<&'static str> {
    let reason = Reason::ALL.iter().find(|reason| reason.name() == row.reason)?;
    let needed = row.ready == Some(Ready::False) && !row.message.contains(reason.meaning());
    needed.then(|| reason.meaning())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::tests::row;

    /// A service on an alignment on a model, with a data set that dropped everything.
    fn fleet() -> Snapshot {
        use Ready::{False, True, Unknown};
        [
            row("dset/plays", True, "Published", Some("sha256:1"), &[]),
            row("dset/pairs", False, "NothingLeft", None, &[]),
            row("pj/base", Unknown, "Running", None, &["dset/plays"]),
            row(
                "aj/chat",
                Unknown,
                "WaitingForInput",
                None,
                &["pj/base", "dset/pairs", "dset/plays"],
            ),
            row("isvc/chat", Unknown, "WaitingForInput", None, &["aj/chat"]),
            row("isvc/lost", Unknown, "ReferenceNotFound", None, &["pj/gone"]),
        ]
        .into()
    }

    #[test]
    fn the_tree_shows_each_resource_once_and_who_is_to_blame() {
        let text = text(&rows(&fleet(), None), None);
        let expected = "\
NAME                     READY     REASON              PROGRESS   MESSAGE
InferenceService/lost    Unknown   ReferenceNotFound              ReferenceNotFound it is
└─ PretrainJob/gone      -         NotFound                       blocks InferenceService/lost; it does not exist (yet): apply it, or correct the name
InferenceService/chat    Unknown   WaitingForInput                WaitingForInput it is
└─ AlignmentJob/chat     Unknown   WaitingForInput                WaitingForInput it is
   ├─ Dataset/pairs      False     NothingLeft                    blocks AlignmentJob/chat, InferenceService/chat; NothingLeft it is
   ├─ Dataset/plays      True      Published                      Published it is
   └─ PretrainJob/base   Unknown   Running                        blocks AlignmentJob/chat, InferenceService/chat; Running it is
      └─ Dataset/plays                                            (shown above)

Dataset/pairs: NothingLeft it is
  Curation dropped everything: relax spec.curate, or put more data there and raise spec.runGeneration.
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_has_published_once_blocks_nobody_and_a_circle_ends() {
        let mut all = fleet();
        let mut again = row("dset/pairs", Ready::Unknown, "Running", Some("sha256:2"), &[]);
        again.1.progress = Some(ProgressStatus {
            activity: "reading".into(),
            percent: 7,
            ..ProgressStatus::default()
        });
        all.extend([again, row("aj/egg", Ready::False, "ReferenceCycle", None, &["aj/hen"])]);
        all.extend([row("aj/hen", Ready::False, "ReferenceCycle", None, &["aj/egg"])]);
        let rows = rows(&all, None);
        let of = |name: &str| rows.iter().find(|row| row.resource == name && !row.again).unwrap();
        assert_eq!(of("Dataset/pairs").blocks, Vec::<String>::new());
        assert_eq!(cells(of("Dataset/pairs"))[3], "7% reading");
        assert_eq!(
            of("PretrainJob/base").blocks,
            ["AlignmentJob/chat", "InferenceService/chat"]
        );
        assert_eq!(of("AlignmentJob/hen").branches, "");
        assert_eq!(of("AlignmentJob/egg").branches, "└─ ");
    }

    #[test]
    fn one_resource_is_shown_with_what_it_stands_on() {
        let root = "pj/base".parse::<crate::resource::Named>().unwrap().0;
        let names: Vec<String> = rows(&fleet(), Some(&root))
            .into_iter()
            .map(|row| row.resource)
            .collect();
        assert_eq!(names, ["PretrainJob/base", "Dataset/plays"]);
    }

    #[test]
    fn a_line_fits_the_terminal() {
        let text = text(&rows(&fleet(), None), Some(40));
        assert!(text.lines().take(9).all(|line| line.chars().count() <= 40), "{text}");
    }
}
