//! Which files a source's path names: a file, all files of a folder, or those that match wildcards.

use std::fs;
use std::path::{Component, Path, PathBuf};

use strata_artifact::ArtifactError;

/// Most files of one source.
const FILES_LIMIT: usize = 1_000_000;

/// The folder that `pattern` starts from, and the files that it names, relative to it, sorted.
///
/// `*` stands for any characters of a name, `?` for one, `**` for any folders. A folder stands for all files below it. What is
/// hidden (its name begins with a dot) is found only by a pattern with that dot.
pub(super) fn expand(pattern: &Path) -> Result<(PathBuf, Vec<String>), ArtifactError> {
    let parts: Vec<&str> = pattern
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    let fixed = parts
        .iter()
        .position(|part| part.contains(['*', '?']))
        .unwrap_or(parts.len());
    let path: PathBuf = Path::new("/").join(parts[..fixed].iter().collect::<PathBuf>());
    let (base, patterns): (PathBuf, Vec<&str>) = if fixed < parts.len() {
        (path, parts[fixed..].to_vec())
    } else if fs::metadata(&path)
        .map_err(|error| ArtifactError::reading(&path, error))?
        .is_dir()
    {
        (path, vec!["**", "*"])
    } else {
        let parent = path.parent().unwrap_or(Path::new("/")).to_owned();
        return Ok((
            parent,
            parts[fixed.saturating_sub(1)..]
                .iter()
                .map(|name| (*name).to_owned())
                .collect(),
        ));
    };
    let mut found = Vec::new();
    walk(&base, "", &patterns, &mut found)?;
    if found.is_empty() {
        let detail = "no file matches".to_owned();
        return Err(ArtifactError::NotFound {
            path: pattern.to_owned(),
            detail,
        });
    }
    found.sort();
    found.dedup();
    Ok((base, found))
}

fn walk(folder: &Path, prefix: &str, patterns: &[&str], found: &mut Vec<String>) -> Result<(), ArtifactError> {
    let Some((pattern, rest)) = patterns.split_first() else {
        return Ok(());
    };
    if *pattern == "**" {
        walk(folder, prefix, rest, found)?;
    }
    let reading = |error| ArtifactError::reading(folder, error);
    for entry in fs::read_dir(folder).map_err(reading)? {
        let entry = entry.map_err(reading)?;
        // Names that are not UTF-8 match no pattern.
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let (path, relative) = (entry.path(), format!("{prefix}{name}"));
        // Links are followed to files, not to folders, where they could lead in a circle.
        let is_folder = entry.file_type().map_err(reading)?.is_dir();
        let inside = format!("{relative}/");
        match (is_folder, *pattern == "**") {
            (true, true) if !name.starts_with('.') => walk(&path, &inside, patterns, found)?,
            (true, false) if matches(pattern, &name) => walk(&path, &inside, rest, found)?,
            (false, false) if rest.is_empty() && matches(pattern, &name) && path.is_file() => found.push(relative),
            _ => {}
        }
        if found.len() > FILES_LIMIT {
            let detail = format!("more than {FILES_LIMIT} files match: split the source");
            return Err(ArtifactError::Corrupt {
                path: folder.to_owned(),
                detail,
            });
        }
    }
    Ok(())
}

/// Whether `name` matches `pattern`; `*` and `?` match a leading dot only if the pattern has one.
fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('.') && !pattern.starts_with('.') {
        return false;
    }
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where to go back to: after the last star, and the character of the name that it takes next.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p + 1, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            (p, n) = (p + 1, n + 1);
        } else if let Some((after, taken)) = star {
            star = Some((after, taken + 1));
            (p, n) = (after, taken + 1);
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_files() {
        let root = tempfile::tempdir().unwrap();
        for name in [
            "b.txt",
            "a.txt",
            ".hidden.txt",
            "c.warc.gz",
            "sub/d.txt",
            "sub/deep/e.txt",
            "other/f.txt",
            ".git/g.txt",
            "sub/.ipynb_checkpoints/d.txt",
        ] {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
        for (pattern, expected) in [
            ("a.txt", vec!["a.txt"]),
            ("*.txt", vec!["a.txt", "b.txt"]),
            ("?.w*c.g*", vec!["c.warc.gz"]),
            (
                "**/*.txt",
                vec!["a.txt", "b.txt", "other/f.txt", "sub/d.txt", "sub/deep/e.txt"],
            ),
            ("*/?.txt", vec!["other/f.txt", "sub/d.txt"]),
            ("sub", vec!["d.txt", "deep/e.txt"]),
            (".g*/*.txt", vec![".git/g.txt"]),
        ] {
            let (base, found) = expand(&root.path().join(pattern)).unwrap();
            assert_eq!(found, expected, "{pattern}");
            assert!(found.iter().all(|name| base.join(name).is_file()), "{pattern}");
        }
        for pattern in ["*.pdf", "none.txt", "none/*.txt"] {
            let error = expand(&root.path().join(pattern)).unwrap_err();
            assert!(matches!(error, ArtifactError::NotFound { .. }), "{pattern}: {error}");
        }
    }
}
