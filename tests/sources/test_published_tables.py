"""Tables as they are published, in their true form: each opens as it is, with at most ``--column`` or ``--task``."""

from __future__ import annotations

import numpy as np
import pytest
from support.small_sets import pictures, refused, reopened, table

from featurecache.sources import Dataset, open_source


def written(folder, name, header, rows, *images):  # type: ignore[no-untyped-def]
    pictures(folder, *images)
    return table(folder, "\n".join([header, *rows]) + "\n", name)


def classes_of(data: Dataset) -> list[str]:
    return ["" if label < 0 else data.classes[label] for label in data.labels.tolist()]


NAN = np.nan
TABLES = {  # name of the file, how it is opened, header, rows, form of the images' paths; what the dataset has
    "NIH ChestX-ray14": (
        "Data_Entry_2017.csv", {}, "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",
        ["00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143,",
         "00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143,",
         "00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,"],
        "images_001/images/{0}", {"classes": ["Cardiomegaly", "Emphysema"], "labels": [[1, 0], [1, 1], [0, 0]],
                                  "groups": ["1", "1", "2"], "Patient Age": [58, 58, 81]},
    ),
    "PadChest": (
        "PADCHEST_labels_160K.csv", {},
        ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,Projection,Labels,Report",
        ["0,20_k6.png,0,20140915,2053,839860,1930.0,L,\"['pulmonary emphysema', 'chronic changes']\",cambio pulmonar",
         "1,13_uj.png,0,20120630,1383,839860,1930.0,PA,['normal'],sin hallazgos",
         "2,11_xx.png,0,20120701,1384,839861,,PA,\"['chronic changes', 'normal']\",",
         "3,12_xx.png,0,20120701,1385,839862,,PA,,"],
        "0/{1}", {"classes": ["chronic changes", "normal", "pulmonary emphysema"],
                  "labels": [[1, 0, 1], [0, 1, 0], [1, 1, 0], [NAN] * 3],
                  "groups": ["839860", "839860", "839861", "839862"]},
    ),
    "the splits of MIMIC-CXR": (
        "mimic-cxr-2.0.0-split.csv", {}, "dicom_id,study_id,subject_id,split",
        ["02aa804e,50414267,10000032,train", "174413ec,50414267,10000032,validate", "2a2277a9,53189527,10000764,test"],
        "files/p10/p{2}/s{1}/{0}.jpg", {"splits": ["train", "val", "test"], "task": "unlabelled",
            "groups": ["10000032", "10000032", "10000764"], "study_id": [50414267, 50414267, 53189527]},
    ),
    "VinDr-CXR, a row for each box": (
        "train.csv", {}, "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max",
        ["50a418190bc3,No finding,14,R11,,,,", "9a5094b2563a,Cardiomegaly,3,R10,691.0,1375.0,1653.0,1831.0",
         "50a418190bc3,No finding,14,R15,,,,", "9a5094b2563a,Aortic enlargement,0,R9,1052.0,715.0,1299.0,966.0",
         "051132a778e6,Cardiomegaly,3,R9,100.0,90.0,110.0,120.0"],
        "train/{0}.png", {"classes": ["Aortic enlargement", "Cardiomegaly"], "labels": [[0, 0], [1, 1], [0, 1]],
                          "understood": "5 rows are 3 images, the findings of the rows of one several labels; "
                                        "columns left out, different between the rows of an image: ",
                          "ids": ["50a418190bc3", "9a5094b2563a", "051132a778e6"]},
    ),
    "RSNA, a row for each box": (
        "stage_2_train_labels.csv", {"columns": {"path": "patientId"}}, "patientId,x,y,width,height,Target",
        ["0004cfab,,,,,0", "00436515,264.0,152.0,213.0,379.0,1", "00436515,562.0,152.0,256.0,453.0,1"],
        "stage_2_train_images/{0}.png", {"classes": ["0", "1"], "labels": [0, 1], "ids": ["0004cfab", "00436515"]},
    ),
    "HAM10000": (
        "HAM10000_metadata.csv", {}, "lesion_id,image_id,dx,dx_type,age,sex,localization",
        ["HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp", "HAM_0000118,ISIC_0025030,bkl,histo,80.0,male,scalp",
         "HAM_0002730,ISIC_0026769,nv,histo,,male,scalp"],
        "HAM10000_images_part_{part}/{1}.jpg", {"classes": ["bkl", "nv"], "labels": [0, 0, 1],
                                           "groups": ["HAM_0000118", "HAM_0000118", "HAM_0002730"]},
    ),
    "APTOS": (
        "train.csv", {"task": "ordinal"}, "id_code,diagnosis",
        ["000c1434d8d7,2", "001639a390f0,4", "0024cdab0c1e,1", "002c21358ce6,0"],
        "train_images/{0}.png", {"task": "ordinal", "classes": ["0", "1", "2", "4"], "labels": [2, 3, 1, 0]},
    ),
    "EyePACS, two eyes of a person": (
        "trainLabels.csv", {}, "image,level", ["10_left,0", "10_right,0", "13_left,2", "13_right,1"],
        "train/{0}.jpeg", {"classes": ["0", "1", "2"], "labels": [0, 0, 2, 1], "groups": ["10", "10", "13", "13"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "how", "header", "rows", "form", "about"), TABLES.values(), ids=TABLES)
def test_a_published_table_opens_as_it_is(tmp_path, name, how, header, rows, form, about):
    images = dict.fromkeys(form.format(*row.split(","), part=1 + k % 2) for k, row in enumerate(rows))
    data = reopened(open_source(written(tmp_path, name, header, rows, *images), **how))
    for field, expected in about.items():
        if field == "understood":
            assert expected in data.source[field]
        else:
            np.testing.assert_array_equal(data.meta.get(field, getattr(data, field, None)), expected, field)
    assert all(data.read(row) for row in range(len(data)))


@pytest.mark.parametrize(("uncertain", "value"), [(None, np.nan), ("zero", 0), ("one", 1)])
def test_chexpert(tmp_path, uncertain, value):
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly,Edema"
    top = "CheXpert-v1.0-small/train"
    names = [
        f"{top}/patient00001/study1/v1.jpg",
        f"{top}/patient00001/study1/v2.jpg",
        f"{top}/patient00002/study1/v1.jpg",
    ]
    about = ["Female,68,Frontal,AP,1.0,,", "Female,68,Lateral,,1.0,0.0,", "Male,87,Frontal,AP,,-1.0,1.0"]
    rows = [f"{name},{more}" for name, more in zip(names, about, strict=True)]
    file = written(tmp_path / "CheXpert-v1.0-small", "train.csv", header, rows)
    pictures(tmp_path, *names)
    data = open_source(file, columns={"label": "Cardiomegaly,Edema"}, uncertain=uncertain)
    np.testing.assert_array_equal(data.labels, [[np.nan] * 2, [0, np.nan], [value, 1]])
    assert data.groups == ["patient00001", "patient00001", "patient00002"]
    assert data.source["uncertain"] == (uncertain or "ignore") and "-1 (1 cell) is read as" in data.source["understood"]
    reopened(data)


@pytest.mark.parametrize("names", ["MEL,NV,BCC,AKIEC,BKL,DF,VASC", "MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"])
def test_isic_2018_and_2019_ground_truth(tmp_path, names):
    width = names.count(",") + 1
    rows = [f"ISIC_{k:07d}," + ",".join(f"{float(k == place)}" for place in range(width)) for k in (1, 0, 3)]
    images = [f"input/ISIC_{k:07d}.jpg" for k in (1, 0, 3)]
    file = written(tmp_path, "GroundTruth.csv", f"image,{names}", rows, *images)
    assert f"hold one 1 in each row: --column label={names}" in open_source(file).notes[0]
    data = open_source(file, columns={"label": names})
    assert (data.task, data.labels.tolist(), data.classes) == ("multiclass", [1, 0, 3], names.split(","))
    assert open_source(file, columns={"label": names}, task="multilabel").labels.shape == (3, width)


# -- several rows of one image, and columns that group


def test_rows_of_one_image_that_agree_are_one_and_those_that_do_not_are_refused(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    data = open_source(table(tmp_path, "path,label,note\na.png,x,1\nb.png,y,1\na.png,X,2\n"))
    assert (data.ids, data.labels.tolist(), list(data.meta)) == (["a.png", "b.png"], [0, 1], [])
    several = table(tmp_path, "path,label\na.png,x\na.png,y\nb.png,y\n")
    assert open_source(several, task="multilabel").labels.tolist() == [[1, 1], [0, 1]]
    assert open_source(table(tmp_path, "path,label\na.png,x\na.png,NA\nb.png,y\n")).labels.tolist() == [0, 1]
    numbers = table(tmp_path, "path,label,x\na.png,0,5\na.png,1,6\n")
    for task in (None, "multilabel"):  # which are no findings
        assert "--task" not in refused(numbers, "lists a.png twice", "label '0' and '1'", task=task)
    refused(table(tmp_path, "path,label,split\na.png,x,train\na.png,x,test\n"), "split 'train' and 'test'")
    one_hot = table(tmp_path, "path,a,b\nb.png,1,0\na.png,1,0\na.png,0,1\n")
    refused(one_hot, "rows 3 and 4: a '1' and '0'", columns={"label": "a,b"})


@pytest.mark.parametrize(
    ("header", "groups", "said"),
    [
        ("path,study_id,patient_id", "patient_id", "groups from patient_id, not study_id"),
        ("path,lesion,case_id", "case_id", "groups from case_id"),
        ("path,Subject ID,age", "Subject ID", "groups from Subject ID"),
    ],
)
def test_the_most_encompassing_column_groups(tmp_path, header, groups, said):
    pictures(tmp_path, *(f"{k}.png" for k in range(4)))
    columns = header.split(",")
    rows = "".join(f"{k}.png,{k},{k // 2}\n" if columns[1] != groups else f"{k}.png,{k // 2},{k}\n" for k in range(4))
    data = open_source(table(tmp_path, header + "\n" + rows))
    assert data.groups == ["0", "0", "1", "1"] and said in data.source["understood"]


def test_a_column_that_repeats_is_named_and_one_of_yes_and_no_is_no_group(tmp_path):
    pictures(tmp_path, *(f"{k}.png" for k in range(12)))
    rows = "".join(f"{k}.png,{k % 2},owner{k // 3},{k % 2}\n" for k in range(12))
    data = open_source(table(tmp_path, "path,label,owner_id,case\n" + rows))
    assert data.groups is None and "--column group=owner_id keeps such images in one split" in data.notes[0]
    assert data.meta["case"].tolist()[:2] == [0, 1]
    assert not open_source(
        table(tmp_path, "path,label,site\n" + rows.replace(",owner", ",s").replace(",0\n", "\n").replace(",1\n", "\n"))
    ).groups


# -- what Excel and others make of a CSV


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(("first", "sign"), [("", ";"), ("sep=;\r\n", ";"), ("", "\t"), ("", "|")])
def test_a_csv_of_excel(tmp_path, encoding, first, sign):
    pictures(tmp_path, "\u00fc.png", "b.png")
    text = f"{first}path;label;note\r\n\u00fc.png;x;1,5\r\nb.png;y;2,5\r\n".replace(";", sign)
    (tmp_path / "t.csv").write_bytes(("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding))
    data = open_source(tmp_path / "t.csv")
    assert (data.ids, classes_of(data), data.meta["note"]) == (["\u00fc.png", "b.png"], ["x", "y"], ["1,5", "2,5"])


def test_rows_are_counted_from_the_top_of_the_file(tmp_path):
    (tmp_path / "t.csv").write_text("sep=,\npath,label\na.png,x\n,y\n")
    refused(tmp_path / "t.csv", "row 4 has no path")
