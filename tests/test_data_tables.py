"""Tables at a site: what is read, what is refused and how the refusal reads."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hospitium_client.data.loading import load_records
from hospitium_client.data.split import split
from hospitium_common.errors import ConfigError, DataRejected, HospitiumError
from hospitium_common.study import Study
from tests.federation_kit import study_of

EVENTS = {
    "window_hours": 4,
    "step_hours": 1,
    "variables": [
        {"name": "HR", "low": 20, "high": 250},
        {"name": "Lactate", "low": 0.1, "high": 30, "scale": "log"},
    ],
    "statics": [{"name": "Age", "low": 0, "high": 120}],
}


def ehr_study():
    document = study_of().model_dump(mode="json")
    document["task"]["kind"] = "ehr_sequence_classification"
    document["data"] = EVENTS
    document["model"] = {"name": "gru", "hidden": 4}
    return Study.model_validate(document)


def write(directory: Path, **files: str) -> Path:
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


ROWS = """patient,age,pressure,lactate,label
a,70,120,2.0,ill
b,50,,1.5,well
c,60,110,900,0
"""
ROW_MAPPING = 'kind = "table"\nfile = "rows.csv"\n'


def test_rows_are_read_and_implausible_values_count_as_missing(tmp_path):
    directory = write(tmp_path, rows__csv=ROWS, dataset__toml=ROW_MAPPING)
    records = load_records(directory, study_of())
    assert records.targets.tolist() == [1, 0, 0]
    assert records.values[0].tolist() == [70.0, 120.0, 2.0]
    assert np.isnan(records.values[1, 1])
    assert np.isnan(records.values[2, 2])


BAD_ROWS = {
    "text in a variable": (
        ROWS.replace("110", "high"),
        ROW_MAPPING,
        "rows.csv, row 4, column 'pressure': expected a finite number or an empty cell",
    ),
    "infinity": (ROWS.replace("110", "inf"), ROW_MAPPING, "rows.csv, row 4, column 'pressure'"),
    "NaN spelled out": (ROWS.replace("110", "NaN"), ROW_MAPPING, "row 4, column 'pressure'"),
    "an unknown label": (
        ROWS.replace("ill", "sick"),
        ROW_MAPPING,
        "row 2, column 'label': expected one of well, ill or its number",
    ),
    "a missing column": (
        ROWS.replace("lactate", "lakt"),
        ROW_MAPPING,
        "expected a column 'lactate', got none of that name",
    ),
    "no header": (
        ROWS.split("\n", 1)[1],
        ROW_MAPPING,
        "expected a column 'patient', got none of that name",
    ),
    "a row with a comma too many": (
        ROWS.replace("b,50,,1.5,well", "b,50,,1,5,well"),
        ROW_MAPPING,
        "rows.csv, row 3: expected as many fields as the header has",
    ),
    "a first row with a comma too many": (
        ROWS.replace("a,70,120,2.0,ill", "a,70,120,2,0,ill"),
        ROW_MAPPING,
        "rows.csv, row 2: expected as many fields as the header has",
    ),
    "a row that is cut short": (ROWS.replace("900,0", "900"), ROW_MAPPING, "rows.csv, row 4: "),
    "an empty line in between": (ROWS.replace("\nb", "\n\nb"), ROW_MAPPING, "rows.csv, row 3: "),
    "a quotation mark that never closes": (
        ROWS.replace("b,50", 'b,"50'),
        ROW_MAPPING,
        "rows.csv: expected a table",
    ),
    "the same row twice": (
        ROWS + "b,50,,1.5,well\n",
        ROW_MAPPING,
        "rows 3 and 5: expected every row once",
    ),
    "an empty file": ("", ROW_MAPPING, "rows.csv: expected a table"),
    "a patient without a name": (
        ROWS.replace("\nb,", "\n,"),
        ROW_MAPPING,
        "row 3, column 'patient'",
    ),
    "no rows at all": (ROWS.splitlines()[0] + "\n", ROW_MAPPING, "at least one usable patient"),
    "a patient in two splits": (
        "patient,age,pressure,lactate,label,part\na,1,1,1,0,train\na,1,1,1,0,test\n",
        ROW_MAPPING + 'split_column = "part"\n',
        "split: expected every patient in one, got one in two (rows 2 and 3",
    ),
    "an unknown split": (
        "patient,age,pressure,lactate,label,part\na,1,1,1,0,train\nb,1,1,1,0,tset\n",
        ROW_MAPPING + 'split_column = "part"\n',
        "row 3: expected a split of train, validation, test",
    ),
    "a header that names another column twice": (
        "patient,age,pressure,lactate,label,x,x\na,1,1,1,0,4,5\n",
        ROW_MAPPING,
        "rows.csv: expected every column name once",
    ),
    "no such file": (ROWS, ROW_MAPPING.replace("rows", "raws"), "raws.csv: expected a table"),
    "a typo in the mapping": (
        ROWS,
        ROW_MAPPING + 'lable_column = "label"\n',
        "dataset.toml: lable_column: unknown key; did you mean 'label_column'?",
    ),
    "a mapping of no known kind": (ROWS, 'kind = "rows"\n', "expected kind to be one of"),
    "data of another kind than the study's": (
        ROWS,
        'kind = "image_npz"\nfile = "x.npz"\n',
        "the study needs table data, this directory holds 'image_npz'",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_file_row_and_column_without_showing_a_value(tmp_path, case):
    rows, mapping, complaint = BAD_ROWS[case]
    directory = write(tmp_path, rows__csv=rows, dataset__toml=mapping)
    with pytest.raises(HospitiumError) as caught:
        load_records(directory, study_of())
    assert complaint in str(caught.value)
    assert isinstance(caught.value, DataRejected | ConfigError)
    cells = {cell for line in rows.splitlines() for cell in line.split(",") if len(cell) > 2}
    cells -= set(ROWS.splitlines()[0].split(",")) | {"well", "ill", "train", "test", "part"}
    shown = all_that_is_said(caught.value).replace(str(tmp_path), "")
    assert not any(cell in shown for cell in cells), shown


def all_that_is_said(error: BaseException | None) -> str:
    """Everything a traceback would print of an exception and what it came from."""
    if error is None:
        return ""
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{error}\n{all_that_is_said(before)}"


DAMAGED_FILES = {
    "a .gz that is cut off": ("rows.csv.gz", lambda raw: gzip.compress(raw)[:-12]),
    "a .gz with wrong bytes": ("rows.csv.gz", lambda raw: gzip.compress(raw)[:30] + b"\0" * 30),
    "a .gz that is none": ("rows.csv.gz", lambda raw: raw),
    "text that is not UTF-8": ("rows.csv", lambda raw: raw.replace(b"a,70", b"\xe4,70")),
    "a parquet that is none": ("rows.parquet", lambda raw: raw),
}


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_a_damaged_table_is_refused_without_what_the_reader_says(tmp_path, case):
    name, damage = DAMAGED_FILES[case]
    (tmp_path / name).write_bytes(damage((ROWS * 20).encode()))
    write(tmp_path, dataset__toml=f'kind = "table"\nfile = "{name}"\n')
    with pytest.raises(DataRejected) as caught:
        load_records(tmp_path, study_of())
    assert f"{name}: expected a table with one header row" in str(caught.value)
    assert all_that_is_said(caught.value).count("\n") == 1


def test_compressed_tables_and_those_that_excel_marks_read_like_plain_ones(tmp_path):
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    write(plain, rows__csv="\ufeff" + ROWS + "\n\n", dataset__toml=ROW_MAPPING)
    (packed / "rows.csv.gz").write_bytes(gzip.compress(ROWS.encode()))
    write(packed, dataset__toml=ROW_MAPPING.replace("rows.csv", "rows.csv.gz"))
    one, two = load_records(plain, study_of()), load_records(packed, study_of())
    np.testing.assert_array_equal(one.values, two.values)
    assert one.patients.tolist() == two.patients.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("patients", [["a", None, "c"], [1.0, None, 3.0]])
def test_a_parquet_row_without_a_patient_is_refused(tmp_path, patients):
    table = pd.DataFrame(
        {"patient": patients, "age": [1, 2, 3], "pressure": 1, "lactate": 1, "label": 0}
    )
    table.to_parquet(tmp_path / "rows.parquet")
    write(tmp_path, dataset__toml='kind = "table"\nfile = "rows.parquet"\n')
    with pytest.raises(DataRejected, match=r"row 2, column 'patient': expected a name"):
        load_records(tmp_path, study_of())


def test_markers_for_missing_values_are_named_by_the_site(tmp_path):
    rows = ROWS.replace("110", "?")
    directory = write(tmp_path, rows__csv=rows, dataset__toml=ROW_MAPPING + 'missing = ["?"]\n')
    assert np.isnan(load_records(directory, study_of()).values[2, 1])


LABELS = "patient,stay,Age,label\na,a1,70,1\na,a2,71,0\nb,b1,50,0\n"
LONG = """stay,time,variable,value
a1,0.5,HR,80
a1,0.9,HR,90
a1,2.0,Lactate,3
a1,4.0,HR,100
a1,-1,HR,100
a2,1,HR,999
b1,3.99,HR,60
zz,1,HR,60
"""
LONG_MAPPING = 'kind = "long"\nevents = "events.csv"\nrecord_column = "stay"\n'


def test_events_fall_on_the_grid_and_the_last_of_a_step_stays(tmp_path):
    directory = write(tmp_path, labels__csv=LABELS, events__csv=LONG, dataset__toml=LONG_MAPPING)
    records = load_records(directory, ehr_study())
    nan = np.nan
    expected = np.array(
        [
            [[90, nan], [nan, nan], [nan, 3], [nan, nan]],
            [[nan, nan]] * 4,  # 999 is implausible
            [[nan, nan], [nan, nan], [nan, nan], [60, nan]],
        ],
        np.float32,
    )
    np.testing.assert_array_equal(records.values, expected)
    assert records.statics.tolist() == [[70], [71], [50]]
    assert records.patients.tolist() == ["a", "a", "b"]
    assert records.patient_count == 2


def test_wide_tables_give_the_same_grid_as_long_ones(tmp_path):
    wide = "stay,time,HR,Lactate\na1,0.5,80,\na1,0.9,90,\na1,2.0,,3\nb1,3.99,60,\n"
    (tmp_path / "long").mkdir()
    (tmp_path / "wide").mkdir()
    one = write(tmp_path / "long", labels__csv=LABELS, events__csv=LONG, dataset__toml=LONG_MAPPING)
    mapping = LONG_MAPPING.replace("long", "wide")
    two = write(tmp_path / "wide", labels__csv=LABELS, events__csv=wide, dataset__toml=mapping)
    study = ehr_study()
    np.testing.assert_array_equal(load_records(one, study).values, load_records(two, study).values)


BAD_EVENTS = {
    "a measurement without a time": ("events", "a1,0.5,", "a1,,", "row 2, column 'time'"),
    "text as a value": ("events", "HR,80", "HR,fast", "row 2, column 'value'"),
    "none of the study's variables": ("events", "HR", "Pulse", None),
    "the same stay twice": ("labels", "b,b1", "b,a1", "rows 2 and 4: expected every record once"),
    "a stay without a label": ("labels", "70,1", "70,", "row 2, column 'label'"),
    "labels of other stays": ("labels", "1,7", "x,7", None),
}


@pytest.mark.parametrize("case", BAD_EVENTS)
def test_bad_events_are_refused_with_file_row_and_column(tmp_path, case):
    which, old, new, complaint = BAD_EVENTS[case]
    labels, events = LABELS, LONG
    if case == "labels of other stays":
        labels = labels.replace("a1", "x1").replace("a2", "x2").replace("b1", "x3")
        complaint = "expected labels for the records of events.csv, got none of them"
    elif case == "none of the study's variables":
        events = events.replace("HR", "Pulse").replace("Lactate", "Acid")
        complaint = "expected measurements of HR, Lactate, got none"
    elif which == "events":
        events = events.replace(old, new, 1)
    else:
        labels = labels.replace(old, new, 1)
    directory = write(tmp_path, labels__csv=labels, events__csv=events, dataset__toml=LONG_MAPPING)
    with pytest.raises(DataRejected) as caught:
        load_records(directory, ehr_study())
    assert complaint in str(caught.value)


def test_rows_of_other_variables_are_not_read_and_row_numbers_stay(tmp_path):
    unread = "a1,soon,Note,patient sleeps\n,,Note,\n"
    directory = write(
        tmp_path,
        labels__csv=LABELS,
        events__csv=LONG.replace("a1,0.5", unread + "a1,0.5"),
        dataset__toml=LONG_MAPPING,
    )
    assert load_records(directory, ehr_study()).values[0, 0, 0] == 90
    (directory / "events.csv").write_text(
        LONG.replace("a1,0.5", unread + "a1,0.5").replace("HR,90", "HR,ninety")
    )
    with pytest.raises(DataRejected, match=r"events\.csv, row 5, column 'value'"):
        load_records(directory, ehr_study())


@pytest.mark.parametrize("kind", ["long", "wide"])
def test_events_that_all_miss_the_window_are_refused(tmp_path, kind):
    events = {
        "long": "stay,time,variable,value\na1,30,HR,80\nb1,-2,HR,80\na2,1,HR,9999\n",
        "wide": "stay,time,HR,Lactate\na1,30,80,1\nb1,-2,80,2\na2,1,,\n",
    }
    directory = write(
        tmp_path,
        labels__csv=LABELS,
        events__csv=events[kind],
        dataset__toml=LONG_MAPPING.replace("long", kind),
    )
    with pytest.raises(DataRejected, match="in its window of 4 hours, got none for any record"):
        load_records(directory, ehr_study())


STAMPED = """stay,time,variable,value
a1,2026-03-01 23:30,Note,
a1,2026-03-02T00:00:00,HR,80
a1,2026-03-02 02:15,Lactate,3
a1,2026-03-02 03:30,HR,200
b1,2026-03-05 10:00,HR,60
"""
ADMITTED = (
    "patient,stay,Age,label,in\n"
    "a,a1,70,1,2026-03-01 23:00\na,a2,71,0,2026-04-01 00:00\nb,b1,50,0,2026-03-05 09:00\n"
)
STAMP_MAPPING = LONG_MAPPING + 'time_unit = "timestamp"\n'


def test_timestamps_count_from_the_records_first_event(tmp_path):
    directory = write(
        tmp_path, labels__csv=LABELS, events__csv=STAMPED, dataset__toml=STAMP_MAPPING
    )
    values = load_records(directory, ehr_study()).values
    assert values[0, 0, 0] == 80  # half an hour after the note, the first event
    assert values[0, 2, 1] == 3
    assert np.isnan(values[0, :, 0]).sum() == 3  # 03:30 is four hours after the first event
    assert values[2, 0, 0] == 60


def test_timestamps_count_from_admission_where_the_labels_say_when_that_was(tmp_path):
    mapping = STAMP_MAPPING + 'admission_column = "in"\n'
    directory = write(tmp_path, labels__csv=ADMITTED, events__csv=STAMPED, dataset__toml=mapping)
    values = load_records(directory, ehr_study()).values
    assert values[0, 1, 0] == 80
    assert values[0, 3, 1] == 3
    assert values[2, 1, 0] == 60
    assert np.isnan(values[1]).all()


def test_timestamps_with_offsets_give_the_same_grid(tmp_path):
    mapping = STAMP_MAPPING + 'admission_column = "in"\n'
    grids = []
    for name, events, admitted in (
        ("plain", STAMPED, ADMITTED),
        (
            "offset",
            STAMPED.replace(":00:00", ":00").replace("02T", "02 ").replace(",HR", "+01:00,HR")
            .replace(",Lac", "+01:00,Lac").replace(",Note", "Z,Note"),
            ADMITTED.replace(":00\n", ":00+01:00\n"),
        ),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        write(tmp_path / name, labels__csv=admitted, events__csv=events, dataset__toml=mapping)
        grids.append(load_records(tmp_path / name, ehr_study()).values)
    np.testing.assert_array_equal(*grids)


BAD_STAMPS = {
    "a day before its month": ("2026-03-02 02:15", "02.03.2026 02:15", "events.csv, row 4"),
    "a day without a time": ("2026-03-02 02:15", "2026-03-02", "events.csv, row 4"),
    "the 31st of a short month": ("2026-03-02 02:15", "2026-02-31 02:15", "events.csv, row 4"),
    "an offset in one row only": ("2026-03-02 02:15", "2026-03-02 02:15Z", "events.csv, row 2"),
    "no admission": ("2026-03-05 09:00", "", "labels.csv, row 4, column 'in': expected a date"),
}


@pytest.mark.parametrize("case", BAD_STAMPS)
def test_a_timestamp_is_refused_that_is(tmp_path, case):
    old, new, complaint = BAD_STAMPS[case]
    mapping = STAMP_MAPPING + 'admission_column = "in"\n'
    write(tmp_path, labels__csv=ADMITTED.replace(old, new), dataset__toml=mapping)
    write(tmp_path, events__csv=STAMPED.replace("Note", "HR").replace(old, new))
    with pytest.raises(DataRejected) as caught:
        load_records(tmp_path, ehr_study())
    assert complaint in str(caught.value)
    assert "2026-0" not in str(caught.value).replace("2026-03-01 14:30", "")


def test_admission_needs_timestamps(tmp_path):
    write(tmp_path, dataset__toml=LONG_MAPPING + 'admission_column = "in"\n')
    with pytest.raises(ConfigError, match="timestamp"):
        load_records(tmp_path, ehr_study())


NOON, HOURS = pd.Timestamp("2020-01-02 12:00"), pd.Timedelta(hours=1)
CODES = 'kind = "meds"\n[codes]\nHR = "LAB//HR"\nAge = "AGE"\nLactate = "LAC"\n'


def write_meds(directory: Path, events: list, labels: pd.DataFrame, mapping: str = CODES) -> Path:
    (directory / "data" / "train").mkdir(parents=True)
    (directory / "labels").mkdir()
    columns = ["subject_id", "time", "code", "numeric_value"]
    table = pd.DataFrame(events, columns=columns)
    table.to_parquet(directory / "data" / "train" / "0.parquet")
    labels.to_parquet(directory / "labels" / "0.parquet")
    return write(directory, dataset__toml=mapping)


def meds_labels(truth=(True, False), subjects=(1, 2), **more) -> pd.DataFrame:
    table = {"subject_id": subjects, "prediction_time": NOON, "boolean_value": truth, **more}
    return pd.DataFrame(table)


def test_meds_events_count_up_to_the_prediction_time_and_no_further(tmp_path):
    events = [
        (1, NOON - 5 * HOURS, "LAB//HR", 70.0),  # before the window
        (1, NOON - 4 * HOURS, "LAB//HR", 80.0),  # the window's first moment
        (1, NOON, "LAB//HR", 95.0),  # the moment of prediction: the last step
        (1, NOON + 1 * HOURS, "LAB//HR", 200.0),  # afterwards: not read
        (1, pd.NaT, "AGE", 66.0),
        (2, NOON - 1 * HOURS, "OTHER", 1.0),
    ]
    records = load_records(write_meds(tmp_path, events, meds_labels()), ehr_study())
    np.testing.assert_array_equal(records.values[0, :, 0], [80, np.nan, np.nan, 95])
    assert np.isnan(records.values[1]).all()
    assert records.statics[0, 0] == 66
    assert records.targets.tolist() == [1, 0]


def test_meds_labels_may_name_site_and_split(tmp_path):
    labels = meds_labels(ward=["north", "south"], part=["train", "test"])
    mapping = CODES.replace("[codes]", 'site_column = "ward"\nsplit_column = "part"\n[codes]')
    events = [(1, NOON - HOURS, "LAB//HR", 70.0)]
    records = load_records(write_meds(tmp_path, events, labels, mapping), ehr_study())
    assert records.sites.tolist() == ["north", "south"]
    assert records.split.tolist() == ["train", "test"]


GOOD_EVENT = (1, NOON - HOURS, "LAB//HR", 70.0)
BAD_MEDS = {
    "a label that is null": ([GOOD_EVENT], meds_labels((True, None)), "row 2, column 'boolean_"),
    "a label that is text": ([GOOD_EVENT], meds_labels(("no", "no")), "row 1, column 'boolean_"),
    "a label without a subject": (
        [GOOD_EVENT],
        meds_labels(subjects=(1, None)),
        "row 2, column 'subject_id'",
    ),
    "two labels for one moment": (
        [GOOD_EVENT],
        meds_labels(subjects=(1, 1)),
        "one label per subject and prediction time",
    ),
    "a label without a time": (
        [GOOD_EVENT],
        meds_labels(prediction_time=[NOON, pd.NaT]),
        "row 2, column 'prediction_time'",
    ),
    "an event without a subject": (
        [GOOD_EVENT, (None, NOON, "LAB//HR", 70.0)],
        meds_labels(),
        "row 2, column 'subject_id'",
    ),
    "an infinite value": (
        [GOOD_EVENT, (1, NOON, "LAB//HR", np.inf)],
        meds_labels(),
        "row 2, column 'numeric_value'",
    ),
    "events after the prediction only": (
        [(1, NOON + HOURS, "LAB//HR", 70.0)],
        meds_labels(),
        "in its window of 4 hours, got none for any record",
    ),
    "events of other subjects only": (
        [(9, NOON - HOURS, "LAB//HR", 70.0)],
        meds_labels(),
        "in its window of 4 hours, got none for any record",
    ),
    "codes that the study does not use": (
        [(1, NOON - HOURS, "OTHER", 70.0)],
        meds_labels(),
        "expected events with the study's codes, got none",
    ),
}


@pytest.mark.parametrize("case", BAD_MEDS)
def test_meds_are_refused_for(tmp_path, case):
    events, truth, complaint = BAD_MEDS[case]
    with pytest.raises(DataRejected) as caught:
        load_records(write_meds(tmp_path, events, truth), ehr_study())
    assert complaint in str(caught.value)


def test_the_split_is_by_patient_repeatable_and_unmoved_by_new_patients(tmp_path):
    people = [f"p{number // 2}" for number in range(400)]
    lines = [f"{name},{number / 10},100,1,0" for number, name in enumerate(people)]
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    head = "patient,age,pressure,lactate,label\n"
    one = write(tmp_path / "one", rows__csv=head + "\n".join(lines), dataset__toml=ROW_MAPPING)
    more = [f"new{number},50,100,1,0" for number in range(50)]
    two = write(
        tmp_path / "two", rows__csv=head + "\n".join(more + lines), dataset__toml=ROW_MAPPING
    )
    study = study_of()
    first, second = load_records(one, study), load_records(two, study)
    cut, again = split(first, study), split(second, study)
    parts = [set(first.patients[index]) for index in (cut.train, cut.validation, cut.test)]
    assert sum(len(part) for part in parts) == 200 == len(set.union(*parts))
    assert 20 < len(parts[1]) < 45  # 15 % of 200
    assert 25 < len(parts[2]) < 57  # 20 % of 200
    assert parts[2] == {name for name in second.patients[again.test] if name[:3] != "new"}
