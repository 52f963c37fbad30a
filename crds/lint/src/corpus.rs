//! The corpus of good and bad manifests, judged by lint here and by a real API server in the e2e suite.
//!
//! One YAML document a file. A bad one begins with a line `# expect: TEXT` for each thing that is wrong with it, where
//! TEXT stands word for word in lint's findings and in the server's answer.

use std::path::{Path, PathBuf};
use std::{fs, io};

/// One manifest of the corpus.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its file.
    pub file: PathBuf,
    /// The manifest.
    pub yaml: String,
    /// What is said about it, in any order; empty for a good one.
    pub expect: Vec<String>,
}

/// Every manifest of the corpus, the good ones first, sorted by file name. For tests, which cargo runs in this folder of the crate.
pub fn corpus() -> io::Result<Vec<Case>> {
    let root = Path::new("corpus");
    let mut cases = Vec::new();
    for folder in ["good", "bad"] {
        let mut files = fs::read_dir(root.join(folder))?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<Vec<_>, _>>()?;
        files.sort();
        for file in files
            .into_iter()
            .filter(|file| file.extension().is_some_and(|ext| ext == "yaml"))
        {
            let yaml = fs::read_to_string(&file)?;
            let expect = yaml
                .lines()
                .map_while(|line| line.strip_prefix("# "))
                .filter_map(|line| line.strip_prefix("expect: "))
                .map(str::to_owned)
                .collect();
            cases.push(Case { file, yaml, expect });
        }
    }
    Ok(cases)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Severity, lint};

    #[test]
    fn every_sample_is_good() {
        let samples = Path::new("../../config/samples");
        let files = [samples.to_path_buf(), samples.join("more")]
            .map(|folder| fs::read_dir(folder).expect("the samples are there"));
        let paths = files.into_iter().flatten().map(|entry| entry.expect("an entry").path());
        let mut seen = 0;
        for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "yaml")) {
            let text = fs::read_to_string(&path).expect("a sample");
            if text.contains("apiVersion: strata.dev/") {
                assert_eq!(lint(&text), [], "{}", path.display());
                seen += 1;
            }
        }
        assert!(seen >= 6, "{seen} samples");
    }

    #[test]
    fn lint_judges_the_corpus_as_its_headers_say() {
        let cases = corpus().expect("the corpus is readable");
        let bad = cases.iter().filter(|case| !case.expect.is_empty()).count();
        assert!(bad >= 20 && cases.len() > bad, "{bad} bad of {}", cases.len());
        for case in cases {
            let mut said: Vec<String> = lint(&case.yaml)
                .into_iter()
                .filter(|finding| finding.severity == Severity::Error)
                .map(|finding| finding.text())
                .collect();
            let mut expect = case.expect;
            said.sort();
            expect.sort();
            assert_eq!(said, expect, "{}", case.file.display());
            assert_eq!(
                expect.is_empty(),
                case.file.parent().is_some_and(|dir| dir.ends_with("good"))
            );
        }
    }
}
