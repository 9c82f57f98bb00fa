"""Settings of the judge: plain types, one comment with the unit per field, one check."""

import dataclasses
import hashlib
import re
import urllib.parse
from pathlib import Path
from typing import TypeAlias

REDIS_SCHEMES = ("redis://", "rediss://")
FIELD_GUIDE_TAXONOMY = Path(__file__).parents[1] / "data" / "field_guide" / "taxonomy.json"
_CHOICES = {
    "kind": ("taxonomy", "endpoint"),
    "mode": ("live", "record", "replay"),
    "auth": ("key", "google"),
    "structured": ("auto", "choice", "json_schema", "grammar", "none"),
    "thinking": ("off", "default"),
}
_AT_LEAST = {
    0: ("requests_per_minute", "tokens_per_minute", "max_retries", "unparsable_retries"),
    1: ("pairs_per_request", "max_reply_tokens", "concurrency", "num_hosts", "max_answer_chars",
        "breaker_failures"),
}  # fmt: skip
_ABOVE_ZERO = ("timeout_s", "backoff_s", "backoff_max_s", "pause_budget_s")

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,63}")

Setting: TypeAlias = str | int | float | bool | tuple[str, ...]


@dataclasses.dataclass
class JudgeConfig:
    """Who judges, how they are asked, and what happens when they do not answer."""

    kind: str = "taxonomy"  # taxonomy: embedded local server | endpoint: the URLs below
    taxonomy: str = ""  # its tree: .json, .csv or a WordNet dict folder; "" field guide
    endpoints: tuple[str, ...] = ()  # base URLs up to /v1, each serving the same model
    model: str = ""  # name sent with each request; "" is taxonomy for kind=taxonomy
    model_revision: str = ""  # part of the cache key; "" for taxonomy: hash of the tree file
    auth: str = "key"  # key: api_key_env | google: application default credentials (google-auth)
    api_key_env: str = ""  # NAME of the environment variable that holds the key, never the key
    prompt: str = "six_way_v1"  # registered prompt, or path of a .toml file
    structured: str = "auto"  # auto | choice | json_schema | grammar | none
    thinking: str = "off"  # off: ask the chat template not to think, where supported | default
    temperature: float = 0.0  # sampling temperature of the judge
    max_reply_tokens: int = 24  # tokens per pair in a reply
    pairs_per_request: int = 1  # pairs in one request; above 1 needs a batch prompt
    voters: tuple[str, ...] = ()  # majority vote: each "field=value,field=value" over this config
    has_cascade: bool = True  # exact match, then synonym table, before the model is asked
    synonyms: str = ""  # path of a synonym table: CSV rows or JSON lists of equal names
    mode: str = "live"  # live | record (live, and keep a recording) | replay (offline)
    recording: str = ""  # SQLite file of record and replay mode
    cache_path: str = ""  # SQLite file of verdicts, or redis://HOST:PORT/DB; "" in memory only
    log_path: str = ""  # SQLite file of the run's verdict log; "" writes none
    concurrency: int = 64  # requests in flight, all hosts together
    num_hosts: int = 1  # hosts of the job that share the three limits equally
    requests_per_minute: int = 0  # all hosts together; 0 no limit
    tokens_per_minute: int = 0  # all hosts together, prompt and reply; 0 no limit
    timeout_s: float = 60.0  # seconds for one request, connection and body included
    max_retries: int = 6  # repeats of a pair that fails while the judge answers others
    unparsable_retries: int = 2  # repeats after a reply that is no category
    backoff_s: float = 0.25  # first wait before a repeat, doubled each time, jittered
    backoff_max_s: float = 15.0  # longest such wait
    breaker_failures: int = 3  # failures in a row (at least one each in flight) that pause
    pause_budget_s: float = 900.0  # seconds without any live endpoint before JudgeDownError
    max_answer_chars: int = 200  # longer normalised answers are a TOO_LONG failure

    def validate(self) -> None:
        """Checks every field that can be checked without a network.

        Raises:
            ValueError: a value is impossible; the message says what to set.
        """
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"judge.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        for least, names in _AT_LEAST.items():
            for name in names:
                if (value := getattr(self, name)) < least:
                    raise ValueError(f"judge.{name}={value}: set it to {least} or more")
        for name in _ABOVE_ZERO:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"judge.{name}={getattr(self, name)}: set seconds above 0")
        if "://" in self.cache_path:
            check_url(self.cache_path)
        self._validate_secrets()
        for voter in self.voters:
            apply_overrides(self, [*voter.split(","), "voters="]).validate()
        if self.mode != "replay":
            self._validate_source()
        if self.mode != "live" and not self.recording:
            raise ValueError(f"judge.mode={self.mode} needs a file: set judge.recording")
        if self.structured == "choice" and self.pairs_per_request > 1:
            raise ValueError(
                "judge.structured=choice constrains one label; with judge.pairs_per_request > 1 "
                "set it to auto or json_schema"
            )

    def _validate_secrets(self) -> None:
        """The part of `validate` about what must not be saved with a run, nor shown."""
        for number, url in enumerate(self.endpoints, start=1):
            check_endpoint(url, number)
        if self.api_key_env and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError(
                "judge.api_key_env: expected the NAME of an environment variable, such as "
                "JUDGE_API_KEY, in capitals, digits and underscores; what was given is not shown, "
                "for it may be the key: export it under a name and give the name"
            )

    def _validate_source(self) -> None:
        """The part of `validate` about who is asked."""
        if self.kind == "endpoint" and not self.endpoints:
            raise ValueError(
                "judge.kind=endpoint has nobody to ask: set judge.endpoints to base URLs "
                "such as http://host:8000/v1"
            )
        if self.kind == "endpoint" and not self.model:
            raise ValueError(
                "judge.kind=endpoint asks for no model: set judge.model to the name under which "
                "it is served"
            )
        if self.kind == "taxonomy" and not self.endpoints and not self.taxonomy_path.exists():
            raise ValueError(
                f"judge.taxonomy={str(self.taxonomy_path)!r}: no such file; set judge.taxonomy"
            )

    @property
    def model_name(self) -> str:
        """The model that is asked for; the offline judge goes by the name taxonomy."""
        return self.model or "taxonomy"

    @property
    def taxonomy_path(self) -> Path:
        """The tree that the embedded judge reads."""
        return Path(self.taxonomy) if self.taxonomy else FIELD_GUIDE_TAXONOMY

    @property
    def revision(self) -> str:
        """Model revision for the cache key; the embedded judge's is the hash of its tree."""
        if self.model_revision or self.kind != "taxonomy" or not self.taxonomy_path.is_file():
            return self.model_revision
        return hashlib.sha256(self.taxonomy_path.read_bytes()).hexdigest()[:16]


def apply_overrides(config: JudgeConfig, assignments: list[str]) -> JudgeConfig:
    """A copy of `config` with `field=value` texts applied, by the type of each field.

    Raises:
        ValueError: no such field, or a value of the wrong type.
    """
    config = dataclasses.replace(config)
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or name not in {field.name for field in dataclasses.fields(config)}:
            said = repr(name) if separator else "without ="  # a value may be a secret
            raise ValueError(f"judge setting {said}: expected FIELD=VALUE of JudgeConfig")
        old = getattr(config, name)
        try:
            setattr(config, name, _parse_like(old, text))
        except ValueError as error:
            raise ValueError(f"judge.{name}={text!r}: expected {type(old).__name__}") from error
    return config


def _parse_like(old: Setting, text: str) -> Setting:
    """`text` as the type of `old`."""
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if isinstance(old, tuple):
        return tuple(part for part in text.split(";") if part)
    return type(old)(text)


def check_endpoint(url: str, number: int) -> None:
    """Refuses a base URL that is incomplete or could carry a secret; never shows it.

    Args:
        number: which of the endpoints, from 1.

    Raises:
        ValueError: says what to set.
    """
    where = f"judge.endpoints: number {number}"
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        is_whole = False
    if not is_whole or any(char.isspace() for char in url):
        raise ValueError(f"{where} is no URL; expected http://HOST:PORT/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{where} holds a user, a query or a fragment, and recipes are saved with the run: "
            "write http://HOST:PORT/v1 and put the key into the variable that judge.api_key_env "
            "names"
        )


def check_url(url: str) -> None:
    """Refuses a URL that is incomplete or carries a password.

    Raises:
        ValueError: says what to set.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    is_whole = is_whole and (parts.path.strip("/") or "0").isdigit()
    if not is_whole or not url.startswith(REDIS_SCHEMES):
        raise ValueError(
            "judge.cache_path: expected a file, or redis://HOST:PORT/DB (rediss:// for TLS) with "
            "numbers for PORT and DB"
        )
    if parts.password or parts.query:
        raise ValueError(
            "judge.cache_path holds a password or options, and recipes are saved with the run: "
            "write redis://HOST:PORT/DB and put the password into REDIS_PASSWORD"
        )
