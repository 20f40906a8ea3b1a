"""Writing to the Hub: repositories that are put back as they were after a failure, and its errors in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

# the first is the HTTP library's base class: a lost connection of huggingface_hub is no OSError
NETWORK_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)


@contextmanager
def repo_for(
    api: HfApi,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    private: bool = False,
    **options: Any,
) -> Iterator[set[str]]:
    """A repository, and of it the branch `revision`, for the commits within.

    If these fail it is as it was: what of it is new goes again, and our commits are taken back by another, unless somebody else has
    written to it meanwhile.

    Yields:
        The hashes of our own commits; add those that are made.

    Raises:
        ValueError: it is to be private, and is not.
    """
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    new_repo = not api.repo_exists(**where)
    new_branch = not new_repo and revision is not None and not api.revision_exists(**where, revision=revision)
    if private and not new_repo and not api.repo_info(**where).private:
        raise ValueError(
            f"{repo_id} is there already, and public: make it private in its settings first, or name another repository."
        )
    if new_repo:
        # None: as the owner's settings say
        api.create_repo(**where, private=private or None, **options)
    before: Any = None
    own_commits: set[str] = set()
    try:
        if revision is not None and (new_repo or new_branch):
            api.create_branch(**where, branch=revision, exist_ok=new_repo)  # a new repository has its main
        before = api.repo_info(**where, revision=revision)
        yield own_commits
    except BaseException:  # of the user's Ctrl-C too
        what = repo_id if new_repo or revision is None else f"the branch {revision} of {repo_id}"
        try:
            head = before and api.repo_info(**where, revision=revision)  # no before: no commit was made
            if head and head.sha != before.sha and head.sha not in own_commits:
                print(f"{what} stays as it is: somebody else has written to it meanwhile.", flush=True)
            elif new_repo:
                api.delete_repo(**where, missing_ok=True)
            elif new_branch:
                api.delete_branch(**where, branch=str(revision))
            elif head and head.sha != before.sha:
                _take_back(api, where, revision, before, head)
                print(f"{what} is as it was before.", flush=True)
        except NETWORK_ERRORS:
            print(f"{what} could not be put back as it was: look at it on the Hub.", flush=True)
        raise


def _take_back(api: HfApi, where: dict[str, Any], revision: str | None, before: Any, head: Any) -> None:
    """A commit that makes the files those of `before`."""
    old, new = ({sibling.rfilename for sibling in info.siblings or []} for info in (before, head))
    api.create_commit(
        **where,
        operations=[
            *(CommitOperationCopy(name, name, src_revision=before.sha) for name in sorted(old)),  # copied on the Hub
            *(CommitOperationDelete(name) for name in sorted(new - old)),
        ],
        commit_message="Take back a push that failed",
        revision=revision,
        parent_commit=head.sha,  # refused if somebody else has written meanwhile
    )


def refusal(error: Exception, repo_id: str, revision: str | None) -> str:
    """What went wrong with the Hub, in one line."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # None: no answer at all
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}."
    # of a repository that the token may not see, the Hub's 401 says that it is not there
    names_token = "token" in str(error).lower() + str(getattr(error, "server_message", "")).lower()
    if isinstance(error, RepositoryNotFoundError) and not (status == 401 and names_token):
        return f"There is no repository {repo_id} on the Hub, or this token may not see it."
    if status == 401:
        return "The Hub does not know this token: run `hf auth login` again, or set HF_TOKEN."
    if status == 403:
        return f"This token may not write to {repo_id}; take one with write access, or --pr to propose the change."
    if status == 412:  # parent_commit is no longer the head
        return f"{repo_id} was changed meanwhile; push again."
    if not isinstance(error, HfHubHTTPError):
        return f"The Hub cannot be reached ({error}). Push again: what is there already is not sent twice."
    reason = getattr(error, "server_message", None) or str(error).splitlines()[0]
    return f"The Hub refused ({status}): {reason}. Push again: what is there already is not sent twice."
