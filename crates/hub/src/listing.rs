//! The files of a repository at a revision, as the hub lists them.

use hf_hub::Repo;
use hf_hub::api::RepoInfo;
use ureq::http::Method;

use crate::address::quoted;
use crate::client::{Client, headers};
use crate::failure::{Asked, Failure};
use crate::names;

/// A listing of a million files has some 30 MB; the hub itself advises against a tenth of that.
const LONGEST: u64 = 64 << 20;

/// Ask for the commit of a revision and the names of its files; they may still be any text.
///
/// # Errors
/// The hub says no, cannot be reached, or is none.
pub(crate) fn listing(client: &Client, asked: Asked) -> Result<RepoInfo, Failure> {
    let repo = Repo::new(asked.name.to_owned(), asked.kind.repo_type());
    // Up to the branch, which may hold any character.
    let path = repo.api_url().replace("/revision/main", "");
    let url = client.address(&format!("/api/{path}/revision/{}", quoted(asked.revision)))?;
    let accept = headers([("Accept", "application/json")])?;
    let body = client.retry(&format!("listing {asked}"), |_| {
        let answer =
            client.request(&Method::GET, url.clone(), &accept, None, client.options.download_timeout)?;
        client.read_all(client.success(answer)?, LONGEST)
    })?;
    if body.trim_ascii_start().starts_with(b"<") {
        let what =
            "the answer is a web page, no listing of a repository: a proxy or a login may stand between";
        return Err(Failure::nonsense(what));
    }
    let info: RepoInfo = serde_json::from_slice(&body)
        .map_err(|e| Failure::nonsense(format!("the answer is no listing of a repository: {e}")))?;
    names::check_commit(&info.sha).map_err(|e| Failure::nonsense(e.to_string()))?;
    Ok(info)
}
