"""The registry's answers for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapterbay.registry.errors import shown
from adapterbay.registry.gate import Guard
from adapterbay.registry.manifest import Manifest
from adapterbay.registry.views import AdapterSummary, PushReceipt, RegistryEvent, VerifyReport, VersionRecord

WIDTH_WITHOUT_TERMINAL: Final = 200
MAX_LINE: Final = 100_000


def write(lines: Iterable[str]) -> None:
    """Lines on standard output; what strangers wrote in them cannot steer the terminal."""
    sys.stdout.writelines(f"{shown(line, MAX_LINE)}\n" for line in lines)
    sys.stdout.flush()


def write_table(table: Table) -> None:
    """A table on standard output: as wide as the terminal, or wide enough for scripts."""
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL).print(table)


def method_text(peft_type: str, rank: int, between: str) -> str:
    """A method and its rank, if it has one."""
    return f"{peft_type}{between}{rank}" if rank else peft_type


def adapter_table(adapters: Iterable[AdapterSummary]) -> Table:
    """One row per adapter."""
    table = Table("Name", "Version", "Aliases", "Task", "Method", "Size", "Pushed (UTC)")
    for adapter in adapters:
        table.add_row(
            adapter.name,
            str(adapter.version),
            ", ".join(f"{alias} → {version}" for alias, version in adapter.alias_versions.items()),
            adapter.task,
            method_text(adapter.peft_type, adapter.rank, " "),
            size(adapter.size_bytes),
            adapter.created_at.strftime("%Y-%m-%d %H:%M"),
        )
    return table


def history_table(events: Iterable[RegistryEvent]) -> Table:
    """One row per event, the oldest first."""
    table = Table("#", "When (UTC)", "By", "Version", "What")
    for event in events:
        table.add_row(
            str(event.sequence),
            event.at.strftime("%Y-%m-%d %H:%M:%S"),
            Text(event.by or "unknown"),
            str(event.version) if event.version else "",
            Text(_what(event)),
        )
    return table


def _what(event: RegistryEvent) -> str:
    detail = event.detail
    if event.kind == "pushed":
        return f"pushed {event.digest[:19]}…"
    if event.kind == "alias_set":
        was = "" if event.previous_version is None else f" (was {event.previous_version})"
        how = "rolled back to" if detail.get("rollback") else "→"
        forced = f", forced: {detail['forced']} [{'; '.join(detail['overruled'])}]" if "forced" in detail else ""
        return f"{event.alias} {how} {event.version}{was}{forced}"
    if event.kind == "alias_removed":
        return f"{event.alias} removed"
    if event.kind == "tagged":
        tags = [f"{key}={value}" if value else key for key, value in detail.get("set", {}).items()]
        return f"tagged {', '.join([*tags, *(f'-{key}' for key in detail.get('removed', ()))])}"
    if event.kind == "deprecated":
        reason = detail.get("reason")
        return "not deprecated any more" if reason is None else f"deprecated: {reason}"
    if event.kind == "guard_set":
        return f"{event.alias} guarded: {Guard.from_document(detail)}"
    if event.kind == "guard_removed":
        return f"{event.alias} not guarded any more"
    if event.kind == "compared":
        return f"compared with {str(detail['against'])[:19]}: {detail['verdict']} ({detail['metric']})"
    if event.kind == "signed":
        return f"signed{' with ' + str(detail['key'])[:23] if detail.get('key') else ''}"
    if event.kind == "committed":
        return f"commit {str(detail['sha'])[:10]} {detail['title']}"
    return f"deleted{': ' + str(detail['reason']) if detail.get('reason') else ''}"


def push_lines(receipt: PushReceipt) -> list[str]:
    """What was found and what was stored."""
    lines = [f"found: {finding}" for finding in receipt.findings]
    stored = f"{size(receipt.new_bytes)} new"
    if receipt.same_as is not None:
        stored += f", same content as version {receipt.same_as}"
    lines.append(f"pushed {receipt.name}@{receipt.version} {receipt.digest} ({stored})")
    lines += [f"alias {receipt.name}@{alias} → {receipt.version}" for alias in receipt.aliases]
    return [*lines, *(f"overruled: {demand}" for demand in receipt.overruled)]


def version_lines(version: VersionRecord, manifest: Manifest) -> list[str]:
    """A version and its manifest."""
    facts = {
        "version": f"{version.name}@{version.version}",
        "digest": version.digest,
        "aliases": ", ".join(version.aliases) or "none",
        "pushed": version.created_at.isoformat(timespec="seconds"),
        "task": version.task,
        "method": method_text(version.peft_type, version.rank, ", rank "),
        "labels": ", ".join(version.labels) or "none",
        "base": version.base_reference,
        "base fingerprint": version.base_fingerprint,
        "parents": ", ".join(manifest.parents) or "none",
        "tags": ", ".join(f"{key}={value}" if value else key for key, value in version.tags.items()) or "none",
        "signed": "yes" if version.signed else "no",
        "libraries": ", ".join(f"{name} {number}" for name, number in manifest.library_versions.items()) or "unknown",
    }
    if version.deprecated is not None:
        facts["deprecated"] = version.deprecated
    if version.metrics:
        facts["metrics"] = ", ".join(f"{name}={value:g}" for name, value in version.metrics.items())
    lines = [f"{name + ':':<18}{value}" for name, value in facts.items()]
    return lines + [f"{'file:':<18}{entry.path}  {size(entry.size)}  {entry.digest}" for entry in manifest.files]


def problem_lines(report: VerifyReport) -> list[str]:
    """One line per problem."""
    lines = [f"problem: {problem}" for problem in report.problems]
    if report.leftovers:
        lines.append(f"{report.leftovers} records are left over from killed pushes; they are no part of the registry.")
    return lines


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
