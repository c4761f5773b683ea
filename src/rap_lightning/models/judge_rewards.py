"""A judge's rewards for all responses of a source, kept on disk: no response is judged twice."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.models.references.logp_store import FORMAT, LogpStore, default_root
from rap_lightning.preferences.judge import Item, Judge
from rap_lightning.preferences.pairs import carrying
from rap_lightning.preferences.read_pairs import read_judged
from rap_lightning.preferences.rewards import Labels, RewardTable, response_key
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source, fingerprint
from rap_lightning.progress_bar import progress


class RewardStore(LogpStore):
    """Rewards of one judge, by digest of conversation and response; a list of one number each."""

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"the judge's rewards can't be written to {self.folder}: {error.strerror or error}. What was written "
            "before is whole and will be used. Make room, or set XDG_CACHE_HOME to another folder."
        )


def judge_rewards(
    judge: Judge, sources: Sequence[Source], split: str, rules: Rules, *, num_proc: int | None = None, asks: bool = True
) -> tuple[RewardTable, list[str]]:
    """Return the rewards of every response of a split, and lines to print about them.

    Scores in the data are ignored. A process that ``asks`` retries responses that got no reward before; of several,
    only one should.

    Raises:
        DataError: a source can't be read, or no response gets a reward.
        ConfigError: the rewards can't be kept.
    """
    settings = {name: json.dumps(value, sort_keys=True) for name, value in judge.settings().items()}
    store = RewardStore(default_root().parent / "rewards", settings | {"format": FORMAT})
    plain = rules.unscored()
    prints = [fingerprint(source, split) for source in sources]
    name = hashlib.sha256(json.dumps([store.key, prints, split, plain.describe()]).encode()).hexdigest()[:24]
    table = RewardTable(store.folder / "tables" / f"{name}.npz")
    if table.path.is_file() and not (asks and table.failed):
        return table, _lines(judge, split, table, Counter())
    items, pairs = _items(sources, split, plain, num_proc)
    missing = [item for item in items.values() if bytes.fromhex(item.id) not in store]
    judge.counts.clear()
    errors: Counter[str] = Counter()
    done = len(items) - len(missing)
    with progress(total=len(items), initial=done, desc=f"rewards of {split}", unit="response", delay=2) as bar:
        for verdicts in judge.judge(missing) if missing else ():
            for verdict in verdicts:
                if verdict.error:
                    errors[verdict.error] += 1
                else:
                    store.add(bytes.fromhex(verdict.id), np.array([verdict.overall], dtype=np.float32))
            bar.update(len(verdicts))
            store.flush_if_due()
    store.flush()
    rewards = {
        key: float(store[digest][0]) for key, item in items.items() if (digest := bytes.fromhex(item.id)) in store
    }
    if not rewards:
        facts = "; ".join(f"{count:,}: {reason}" for reason, count in errors.most_common(3))
        raise DataError(f"{type(judge).__name__} gave no response of split {split} a reward. {facts}")
    found = [(rewards[one], rewards[two]) for one, two in pairs if one in rewards and two in rewards]
    labels = Labels(*(sum(test(a, b) for a, b in found) for test in (float.__gt__, float.__lt__, float.__eq__)))
    table = RewardTable.write(table.path, rewards, len(items) - len(rewards), labels)
    return table, _lines(judge, split, table, errors)


def _items(
    sources: Sequence[Source], split: str, plain: Rules, num_proc: int | None
) -> tuple[dict[int, Item], list[tuple[int, int]]]:
    """Return each different response by its key, and (chosen, rejected) keys as labelled in the data."""
    items: dict[int, Item] = {}
    pairs = []
    for source in sources:
        for judged in read_judged(source, split, plain, num_proc=num_proc):
            keys = [response_key(judged.history, response.text) for response in judged.responses]
            for key, response in zip(keys, judged.responses, strict=True):
                items.setdefault(key, Item(f"{key:016x}", tuple(carrying(judged.history, judged.tools)), response.text))
            if judged.paired and len(keys) == 2:
                pairs.append((keys[0], keys[1]))
    return items, pairs


def _lines(judge: Judge, split: str, table: RewardTable, errors: Counter[str]) -> list[str]:
    values, labels = list(table.rewards.values()), table.labels
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    lines = [
        f"{split}: {len(values):,} responses with rewards by {type(judge).__name__}, median {middle:.3g}, 90% of them "
        f"from {low:.3g} to {high:.3g}"
    ]
    if labels != Labels():
        lines.append(f"  {labels.line()}")
    if table.failed:
        lines.append(f"  {table.failed:,} got none; the next run retries them")
    lines += [f"  {count:,}: {reason}" for reason, count in errors.most_common()]
    return lines + [f"  {count:,}: {what}" for what, count in judge.counts.most_common()]
