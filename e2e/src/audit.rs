//! The API server's audit log, from which tests count what one user wrote.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _, Seek, SeekFrom};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::bed::{Bed, config};

/// Longer than any line of the log: its policy asks for no bodies.
const LONGEST_LINE_BYTES: u64 = 1 << 20;

/// A point in time: how long the log was.
#[derive(Debug, Clone, Copy)]
pub struct Mark(u64);

/// A request that changed something, or tried to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    /// Plural name, with the subresource: `datasets/status`.
    pub resource: String,
    /// Empty for what lives in no namespace.
    pub namespace: String,
    /// Empty where the server chose it, or for a whole collection.
    pub name: String,
    /// The HTTP status of the answer.
    pub code: u16,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    verb: String,
    user: User,
    /// Whom `user` acted as.
    impersonated_user: Option<User>,
    #[serde(default)]
    object_ref: Object,
    #[serde(default)]
    response_status: Status,
}

#[derive(Deserialize)]
struct User {
    username: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Object {
    resource: String,
    subresource: String,
    namespace: String,
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    code: u16,
}

/// Now.
///
/// # Errors
/// The bed has no audit log.
pub fn mark(bed: &Bed) -> Result<Mark> {
    let mut log = open(bed)?;
    let length = log.metadata()?.len();
    // The server may be in the middle of its last line, which is still to come then.
    let looked_at = length.min(LONGEST_LINE_BYTES);
    log.seek(SeekFrom::Start(length - looked_at))?;
    let mut tail = Vec::new();
    log.take(looked_at).read_to_end(&mut tail)?;
    let begun = tail.iter().rev().take_while(|byte| **byte != b'\n').count();
    Ok(Mark(length - begun as u64))
}

/// What `user` wrote since `since`: `system:serviceaccount:NAMESPACE:NAME` for a pod.
///
/// # Errors
/// The bed has no audit log, one that is not the API server's, or one that is younger than the mark.
pub fn writes(bed: &Bed, user: &str, since: Mark) -> Result<Vec<Write>> {
    let mut log = open(bed)?;
    ensure!(
        log.metadata()?.len() >= since.0,
        "the audit log was begun anew meanwhile"
    );
    log.seek(SeekFrom::Start(since.0))?;
    read(BufReader::new(log), user)
}

fn open(bed: &Bed) -> Result<File> {
    let path = config::audit_log(bed.state());
    File::open(&path).with_context(|| format!("cannot read the audit log {}", path.display()))
}

fn read(mut log: impl BufRead, user: &str) -> Result<Vec<Write>> {
    let mut writes = Vec::new();
    let mut line = Vec::new();
    loop {
        line.clear();
        log.read_until(b'\n', &mut line)?;
        // The end, or a line that the server is in the middle of.
        if line.last() != Some(&b'\n') {
            return Ok(writes);
        }
        let event: Event = serde_json::from_slice(&line).context("a line of the audit log is no audit event")?;
        if event.impersonated_user.unwrap_or(event.user).username != user {
            continue;
        }
        let Object {
            resource,
            subresource,
            namespace,
            name,
        } = event.object_ref;
        let resource = if subresource.is_empty() {
            resource
        } else {
            format!("{resource}/{subresource}")
        };
        writes.push(Write {
            verb: event.verb,
            resource,
            namespace,
            name,
            code: event.response_status.code,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_users_whole_lines_count() {
        let log = r#"{"verb":"patch","user":{"username":"me"},"objectRef":{"resource":"datasets","subresource":"status","namespace":"n","name":"a"},"responseStatus":{"code":200}}
{"verb":"create","user":{"username":"other"},"objectRef":{"resource":"jobs"},"responseStatus":{"code":201}}
{"verb":"create","user":{"username":"me"},"impersonatedUser":{"username":"other"},"objectRef":{"resource":"pods"}}
{"verb":"create","user":{"username":"admin"},"impersonatedUser":{"username":"me"},"objectRef":{"resource":"namespaces","name":"n"},"responseStatus":{"code":409}}
{"verb":"create","user":{"usern"#;
        let write = |verb: &str, resource: &str, namespace: &str, name: &str, code| Write {
            verb: verb.into(),
            resource: resource.into(),
            namespace: namespace.into(),
            name: name.into(),
            code,
        };
        let expected = [
            write("patch", "datasets/status", "n", "a", 200),
            write("create", "namespaces", "", "n", 409),
        ];
        assert_eq!(read(log.as_bytes(), "me").unwrap(), expected);
    }
}
