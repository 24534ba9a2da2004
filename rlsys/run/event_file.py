"""One TensorBoard event file, written with the tensorboard package because the wrapper in torch would load torch."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.files import RecordFile

BUCKETS = 30  # of a histogram; TensorBoard draws as many


class EventFile:
    """An event file of a run. A resumed run adds a file.

    TensorBoard reads the files in the order of their names. The session start at `purge_step` makes it ignore the
    events of earlier files from that step on.

    Args:
        purge_step: first step that this file writes again.
        say: called with a message when events cannot be written and wait in memory.
        meaning: returns the description of a tag, shown beside its chart.
    """

    def __init__(
        self, folder: Path, purge_step: int, say: Callable[[str], None], meaning: Callable[[str], str]
    ) -> None:
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._proto = Event, summary_pb2
        self._meaning = meaning
        self._described: set[str] = set()
        before = len(list(folder.glob("events.out.tfevents.*")))
        paths = (folder / f"events.out.tfevents.{number:010d}" for number in itertools.count(before))
        self._file = RecordFile(next(path for path in paths if not path.exists()), say)
        self._records = RecordWriter(self._file)  # writes each record in one call
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by tag."""
        self._values(step, [self._value(tag, "scalars", simple_value=value) for tag, value in values.items()])

    def histogram(self, step: int, tag: str, numbers: np.ndarray) -> None:
        """Write the distribution of at least one number."""
        spread, largest = float(np.ptp(numbers)), float(np.abs(numbers).max())
        # numpy cannot divide a range that rounding alone has made.
        counts, edges = np.histogram(numbers, bins=1 if spread <= 1e-9 * max(1.0, largest) else BUCKETS)
        proto = self._proto.HistogramProto(
            min=float(numbers.min()),
            max=float(numbers.max()),
            num=float(numbers.size),
            sum=float(numbers.sum()),
            sum_squares=float(np.square(numbers).sum()),
            bucket_limit=edges[1:].tolist(),
            bucket=counts.tolist(),
        )
        self._values(step, [self._value(tag, "histograms", histo=proto)])

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Write a text, which TensorBoard renders as Markdown."""
        self._values(step, [self._value(tag, "text", tensor=_string(markdown.encode(errors="replace")))])

    def layout(self, layout: Any) -> None:
        """Write the charts of the tab Custom Scalars, a `layout_pb2.Layout`."""
        from tensorboard.plugins.custom_scalar import metadata

        tensor = _string(layout.SerializeToString())
        value = self._proto.Summary.Value(
            tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata.create_summary_metadata()
        )
        self._values(0, [value])

    def settings(self, content: Mapping[str, Any]) -> None:
        """Write the tab HParams: plugin data by tag."""
        from tensorboard.plugins.hparams import metadata

        values = [
            self._proto.Summary.Value(
                tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
            )
            for tag, data in content.items()
        ]
        self._values(0, values)

    def sync(self) -> None:
        """Flush all events to disk; raises CheckpointError if they cannot be written."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _value(self, tag: str, plugin: str, **content: Any) -> Any:
        """Return the value of a tag. The first value of a tag in a file has its description."""
        value = self._proto.Summary.Value(tag=tag, **content)
        if tag not in self._described:
            self._described.add(tag)
            value.metadata.summary_description = self._meaning(tag)
            value.metadata.plugin_data.plugin_name = plugin
        return value

    def _values(self, step: int, values: list[Any]) -> None:
        self._write(self._event(step=step, summary=self._proto.Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()  # noqa: TID251 - only shown to people, by TensorBoard
        self._records.write(event.SerializeToString())


def _string(content: bytes) -> Any:
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    return TensorProto(dtype=DT_STRING, string_val=[content])
