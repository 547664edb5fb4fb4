"""Shards of recorded calls: a folder of files with a few prompts each, written by several ranks, and the manifest of all.

What a shard holds depends on its prompts alone, so that an interrupted job continues, with any number of processes, to the same
bytes. Ranks write them as `core/ranks.py` describes; `data/recorded.py` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import check_space, sha256_of, write_json
from tinyfusion.core.ranks import complete_file
from tinyfusion.core.reading import read_json_object
from tinyfusion.core.records import FORMAT_VERSION
from tinyfusion.data.recorded import FACTS, MANIFEST, Call, check_size, packed, recorded_in

# no time and no machine: equal calls are equal bytes
_MARKS = {"made_by": "tinyfusion", "format_version": FORMAT_VERSION}


@dataclass(frozen=True)
class RecordShards:
    """The shards of a folder. num: prompts. shard_prompts: of every shard but the last."""

    folder: Path
    num: int
    shard_prompts: int

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.num // self.shard_prompts)

    def file(self, shard: int) -> Path:
        """Path of a shard."""
        return self.folder / f"shard-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def prompts(self, shard: int) -> range:
        """The numbers of the prompts of a shard."""
        return range(shard * self.shard_prompts, min((shard + 1) * self.shard_prompts, self.num))

    def missing(self) -> list[int]:
        """Shards that are to be written."""
        return [shard for shard in range(self.num_shards) if not self.file(shard).is_file()]

    def write(self, shard: int, calls: Sequence[Call], facts: Mapping[str, Any]) -> int:
        """Write a shard, whole or not at all. Returns its bytes. facts: as in `FACTS`."""
        tensors, header = packed(calls, {**_MARKS, **facts, **self._place(shard)})
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        check_space(self.folder, num_bytes)
        with complete_file(self.file(shard)) as temporary:
            save_file(tensors, temporary, header)  # one text in the header: several have no order
        return num_bytes

    def _place(self, shard: int) -> dict[str, int]:
        return {"first_prompt": self.prompts(shard).start, "num_prompts": len(self.prompts(shard))}

    def finish(self, facts: Mapping[str, Any], about: Mapping[str, Any]) -> int:
        """Write the manifest of complete shards. Returns the number of calls. about: more fields.

        Raises UserError where a shard is damaged, or of another job.
        """
        entries, own = list[dict[str, Any]](), dict[str, Any](facts)
        for shard in range(self.num_shards):
            path = self.file(shard)
            try:
                record = recorded_in(path) or {}
            except UserError as error:
                raise UserError(f"{error}: remove it, and repeat the command") from error
            wanted = {**own, **self._place(shard)}
            if odd := [name for name, value in wanted.items() if record.get(name) != value]:
                raise UserError(
                    f"{path} does not go with the others: {odd[0]} is {record.get(odd[0])!r}, wanted {wanted[odd[0]]!r}; remove it, and "
                    "repeat the command"
                )
            entries.append(
                {
                    "file": path.name,
                    "calls": len(record["calls"]),
                    "bytes": path.stat().st_size,
                    "sha256": sha256_of(path),
                }
            )
        values = {**_MARKS, **own, "prompts": self.num, "shard_prompts": self.shard_prompts, **about, "shards": entries}
        write_json(self.folder / MANIFEST, values)
        return sum(entry["calls"] for entry in entries)

    def written_facts(self) -> dict[str, Any]:
        """The facts of the model in the first shard."""
        record = recorded_in(self.file(0)) or {}
        return {name: record.get(name) for name in FACTS}

    def verify(self) -> int:
        """The number of calls. Raises UserError on the first shard whose checksum is not that of the manifest."""
        entries: list[dict[str, Any]] = read_json_object(self.folder / MANIFEST)["shards"]
        for entry in entries:
            check_size(self.folder / entry["file"], entry["bytes"])
            if sha256_of(self.folder / entry["file"]) != entry["sha256"]:
                raise UserError(
                    f"{self.folder / entry['file']} is damaged: its SHA-256 is not that of {MANIFEST}; repeat the command with --overwrite"
                )
        return sum(int(entry["calls"]) for entry in entries)
