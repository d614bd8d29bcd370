"""The notes of a score in MusicXML, played once through at a steady pace."""

import io
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path
from typing import NamedTuple

_SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}


class Note(NamedTuple):
    """A key of MIDI (60 is middle C), and from when to when it is held, in quarter notes."""

    key: int
    start: float
    end: float


def read_score(path: Path) -> list[Note]:
    """The notes of a compressed score (.mxl), those that are tied as one; without repeats and graces.

    Raises:
        ValueError: when it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            container = ET.parse(io.BytesIO(archive.read("META-INF/container.xml")))
            root = next(element for element in container.iter() if element.tag.endswith("rootfile"))
            score = ET.fromstring(archive.read(root.attrib["full-path"]))
    except (zipfile.BadZipFile, ET.ParseError, KeyError, StopIteration, OSError) as error:
        raise ValueError(f"it is no compressed MusicXML ({error})") from None
    return sorted(note for part in score.iterfind("part") for note in _part(part))


def _part(part: ET.Element) -> list[Note]:
    notes: list[Note] = []
    now, divisions, begun = 0.0, 1.0, 0.0
    for element in part.iterfind("measure/*"):
        if element.tag == "attributes":
            divisions = float(element.findtext("divisions", str(divisions)))
        length = float(element.findtext("duration", "0")) / divisions
        if element.tag in ("backup", "forward"):
            now += length if element.tag == "forward" else -length
        elif element.tag == "note" and length:
            # a note of a chord begins with the one before it
            begun = begun if element.find("chord") is not None else now
            now = max(now, begun + length)
            pitch = element.find("pitch")
            if pitch is not None:
                note = Note(_key(pitch), begun, begun + length)
                tied = any(tie.get("type") == "stop" for tie in element.iterfind("tie"))
                before = (
                    [i for i, n in enumerate(notes) if (n.key, n.end) == (note.key, note.start)]
                    if tied
                    else []
                )
                if before:
                    notes[before[0]] = notes[before[0]]._replace(end=note.end)
                else:
                    notes.append(note)
    return notes


def _key(pitch: ET.Element) -> int:
    step, octave = pitch.findtext("step", "C"), int(pitch.findtext("octave", "4"))
    return 12 * (octave + 1) + _SEMITONES[step] + round(float(pitch.findtext("alter", "0")))
