"""Tables as they are published, in their true form: each opens as it is, with at most ``--column`` or ``--task``."""

from __future__ import annotations

import numpy as np
import pytest
from support.small_sets import pictures, reopened, table

from featurecache.sources import Dataset, open_source


def written(folder, name, header, rows, *images):  # type: ignore[no-untyped-def]
    pictures(folder, *images)
    return table(folder, "\n".join([header, *rows]) + "\n", name)


def classes_of(data: Dataset) -> list[str]:
    return ["" if label < 0 else data.classes[label] for label in data.labels.tolist()]


def test_nih_chest_x_ray_14(tmp_path):
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    header += ",OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    rows = [
        "00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143,",
        "00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143,",
        "00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,",
    ]
    images = [f"images_001/images/{row.split(',')[0]}" for row in rows]
    data = open_source(written(tmp_path, "Data_Entry_2017.csv", header, rows, *images))
    assert (data.task, data.classes, data.groups) == ("multilabel", ["Cardiomegaly", "Emphysema"], ["1", "1", "2"])
    assert data.labels.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert data.meta["Patient Age"].tolist() == [58, 58, 81] and data.read(2)
    reopened(data)


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
    assert (
        data.source["uncertain"] == (uncertain or "ignore") and "-1 (1 cells) is read as" in data.source["understood"]
    )
    reopened(data)


def test_padchest(tmp_path):
    header = ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,Projection,Labels,Report"
    rows = [
        "0,20_k6.png,0,20140915,2053,839860,1930.0,L,\"['pulmonary emphysema', 'chronic changes']\",cambio pulmonar",
        "1,13_uj.png,0,20120630,1383,839860,1930.0,PA,['normal'],sin hallazgos",
        "2,11_xx.png,0,20120701,1384,839861,,PA,\"['chronic changes', 'normal']\",",
        "3,12_xx.png,0,20120701,1385,839862,,PA,,",
    ]
    names = [f"0/{row.split(',')[1]}" for row in rows]
    data = open_source(written(tmp_path, "PADCHEST_labels_160K.csv", header, rows, *names))
    assert data.classes == ["chronic changes", "normal", "pulmonary emphysema"]
    np.testing.assert_array_equal(data.labels, [[1, 0, 1], [0, 1, 0], [1, 1, 0], [np.nan] * 3])
    assert data.groups == ["839860", "839860", "839861", "839862"]


def test_mimic_cxr_split_table(tmp_path):
    header = "dicom_id,study_id,subject_id,split"
    rows = [
        "02aa804e,50414267,10000032,train",
        "174413ec,50414267,10000032,validate",
        "2a2277a9,53189527,10000764,test",
    ]
    names = [f"files/p10/p{r.split(',')[2]}/s{r.split(',')[1]}/{r.split(',')[0]}.jpg" for r in rows]
    data = open_source(written(tmp_path, "mimic-cxr-2.0.0-split.csv", header, rows, *names))
    assert (data.splits, data.groups) == (["train", "val", "test"], ["10000032", "10000032", "10000764"])
    assert (data.task, data.meta["study_id"].tolist()[0]) == ("unlabelled", 50414267) and data.read(0)


def test_vindr_cxr_has_a_row_for_each_box(tmp_path):
    header = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
    rows = [
        "50a418190bc3,No finding,14,R11,,,,",
        "9a5094b2563a,Cardiomegaly,3,R10,691.0,1375.0,1653.0,1831.0",
        "50a418190bc3,No finding,14,R15,,,,",
        "9a5094b2563a,Aortic enlargement,0,R9,1052.0,715.0,1299.0,966.0",
        "051132a778e6,Cardiomegaly,3,R9,100.0,90.0,110.0,120.0",
    ]
    names = [f"train/{name}.png" for name in ("50a418190bc3", "9a5094b2563a", "051132a778e6")]
    data = open_source(written(tmp_path, "train.csv", header, rows, *names))
    assert (data.classes, data.labels.tolist()) == (["Aortic enlargement", "Cardiomegaly"], [[0, 0], [1, 1], [0, 1]])
    assert data.ids == ["50a418190bc3", "9a5094b2563a", "051132a778e6"]
    assert "5 rows are 3 images, the findings of the rows of one several labels" in data.understood
    assert "columns left out, different between the rows of an image" in data.source["understood"]


def test_rsna_has_a_row_for_each_box(tmp_path):
    header = "patientId,x,y,width,height,Target"
    rows = ["0004cfab,,,,,0", "00436515,264.0,152.0,213.0,379.0,1", "00436515,562.0,152.0,256.0,453.0,1"]
    names = [f"stage_2_train_images/{name}.png" for name in ("0004cfab", "00436515")]
    file = written(tmp_path, "stage_2_train_labels.csv", header, rows, *names)
    data = open_source(file, columns={"path": "patientId"})
    assert (data.ids, data.classes, data.labels.tolist()) == (["0004cfab", "00436515"], ["0", "1"], [0, 1])


def test_ham10000(tmp_path):
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization"
    rows = [
        "HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp",
        "HAM_0000118,ISIC_0025030,bkl,histo,80.0,male,scalp",
        "HAM_0002730,ISIC_0026769,nv,histo,,male,scalp",
    ]
    names = [f"HAM10000_images_part_{1 + k % 2}/{row.split(',')[1]}.jpg" for k, row in enumerate(rows)]
    data = open_source(written(tmp_path, "HAM10000_metadata.csv", header, rows, *names))
    assert (classes_of(data), data.groups) == (["bkl", "bkl", "nv"], ["HAM_0000118", "HAM_0000118", "HAM_0002730"])


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


def test_aptos(tmp_path):
    rows = ["000c1434d8d7,2", "001639a390f0,4", "0024cdab0c1e,1", "002c21358ce6,0"]
    names = [f"train_images/{row.split(',')[0]}.png" for row in rows]
    data = open_source(written(tmp_path, "train.csv", "id_code,diagnosis", rows, *names), task="ordinal")
    assert (data.task, classes_of(data), data.classes) == ("ordinal", ["2", "4", "1", "0"], ["0", "1", "2", "4"])


def test_eyepacs_has_two_eyes_of_a_person(tmp_path):
    rows = ["10_left,0", "10_right,0", "13_left,2", "13_right,1"]
    names = [f"train/{row.split(',')[0]}.jpeg" for row in rows]
    data = open_source(written(tmp_path, "trainLabels.csv", "image,level", rows, *names))
    assert (classes_of(data), data.groups) == (["0", "0", "2", "1"], ["10", "10", "13", "13"])


# -- several rows of one image, and columns that group


def test_rows_of_one_image_that_agree_are_one_and_those_that_do_not_are_refused(tmp_path):
    from support.small_sets import refused

    pictures(tmp_path, "a.png", "b.png")
    data = open_source(table(tmp_path, "path,label,note\na.png,x,1\nb.png,y,1\na.png,X,2\n"))
    assert (data.ids, data.labels.tolist(), list(data.meta)) == (["a.png", "b.png"], [0, 1], [])
    several = table(tmp_path, "path,label\na.png,x\na.png,y\nb.png,y\n")
    assert open_source(several, task="multilabel").labels.tolist() == [[1, 1], [0, 1]]
    refused(table(tmp_path, "path,label,x\na.png,0,5\na.png,1,6\n"), "lists a.png twice", "label '0' and '1'")
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("first", ["", "sep=;\r\n"])
def test_a_csv_of_excel(tmp_path, encoding, first):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "t.csv").write_bytes(f"{first}path;label;note\r\na.png;x;1,5\r\nb.png;y;2,5\r\n".encode(encoding))
    data = open_source(tmp_path / "t.csv")
    assert (data.ids, classes_of(data), data.meta["note"]) == (["a.png", "b.png"], ["x", "y"], ["1,5", "2,5"])


def test_rows_are_counted_from_the_top_of_the_file(tmp_path):
    from support.small_sets import refused

    (tmp_path / "t.csv").write_text("sep=,\npath,label\na.png,x\n,y\n")
    refused(tmp_path / "t.csv", "row 4 has no path")
