//! `strata lint` and the API server judge the same manifests alike, with the same words.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use strata_e2e::{Context, install, repository, with_temp_ns};

#[tokio::test]
async fn lint_and_the_server_judge_alike() {
    with_temp_ns(|context| async move {
        install::once(&context.bed)?;
        let corpus = repository::path("crds/lint/corpus");
        let mut wrong = Vec::new();
        for (folder, good) in [("good", true), ("bad", false)] {
            let files = fs::read_dir(corpus.join(folder)).with_context(|| format!("the corpus has {folder}"))?;
            let mut count = 0;
            for file in files {
                let path = file?.path();
                count += 1;
                wrong.extend(
                    judge(&context, &path, good)
                        .await?
                        .map(|what| format!("{}: {what}", path.display())),
                );
            }
            ensure!(count > 0, "there are {folder} manifests");
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    })
    .await;
}

/// What is wrong with the verdicts about one file, if anything is.
async fn judge(context: &Context, path: &Path, good: bool) -> Result<Option<String>> {
    let text = fs::read_to_string(path)?;
    let findings = strata_lint::lint(&text);
    let name = path.display().to_string();
    let server = context
        .kubectl(["apply", "--dry-run=server", "--validate=strict", "-f", &name])
        .await;
    Ok(match (good, findings.is_empty(), &server) {
        (true, true, Ok(_)) => None,
        (true, false, _) => Some(format!("lint refuses a good manifest: {findings:?}")),
        (true, true, Err(error)) => Some(format!("the server refuses a good manifest: {error:#}")),
        (false, true, _) => Some("lint lets a bad manifest pass".into()),
        (false, false, Ok(_)) => Some("the server lets a bad manifest pass".into()),
        (false, false, Err(error)) => {
            let said = format!("{error:#}");
            let unlike = text
                .lines()
                .filter_map(|line| line.strip_prefix("# expect: "))
                .find(|words| !said.contains(words));
            unlike.map(|words| format!("the server's message has no {words:?}: {said}"))
        }
    })
}
