"""Naive twins of VoteNet's ScanNet preparation and of its loader's votes, vertex by vertex."""

import csv
import json
import struct

import numpy as np

IDS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)


def read_mesh(path):
    """The vertices of a binary PLY of the layout that ScanNet uses (x y z red green blue alpha)."""
    data = path.read_bytes()
    header, _, body = data.partition(b"end_header\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    rows = [struct.unpack_from("<fffBBBB", body, 16 * i) for i in range(count)]
    return np.array([row[:6] for row in rows])


def export_scan(folder, scene, tsv):
    """Gives (vertices [n, 6], label [n], instance [n], boxes [k, 7]) as VoteNet writes them."""
    with open(tsv, newline="") as file:
        to_id = {row["raw_category"]: int(row["nyu40id"]) for row in csv.DictReader(file, delimiter="\t")}
    vertices = read_mesh(folder / f"{scene}_vh_clean_2.ply").astype(np.float32)
    for line in (folder / f"{scene}.txt").read_text().splitlines():
        if "axisAlignment" in line:
            matrix = np.array([float(word) for word in line.split("=")[1].split()]).reshape(4, 4)
    for row in vertices:
        point = [float(row[0]), float(row[1]), float(row[2]), 1.0]
        row[:3] = [sum(matrix[i][j] * point[j] for j in range(4)) for i in range(3)]
    vertices_of_segment = {}
    segments = json.loads((folder / f"{scene}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"]
    for vertex, segment in enumerate(segments):
        vertices_of_segment.setdefault(segment, []).append(vertex)
    groups = json.loads((folder / f"{scene}.aggregation.json").read_text())["segGroups"]
    label, instance = np.zeros(len(vertices), int), np.zeros(len(vertices), int)
    for category in dict.fromkeys(group["label"] for group in groups):
        for group in groups:
            if group["label"] == category:
                for segment in group["segments"]:
                    label[vertices_of_segment[segment]] = to_id[category]
    class_of_object = {}
    for group in groups:
        for segment in group["segments"]:
            instance[vertices_of_segment[segment]] = group["objectId"] + 1
        first = vertices_of_segment[group["segments"][0]][0]
        class_of_object[group["objectId"] + 1] = label[first]
    boxes = []
    for number in sorted(class_of_object):
        points = vertices[instance == number, :3]
        if class_of_object[number] in IDS and len(points):
            low, high = points.min(0), points.max(0)
            boxes.append([*(low + high) / np.float32(2), *(high - low), class_of_object[number]])
    return vertices, label, instance, np.array(boxes, np.float64).reshape(-1, 7)


def votes(xyz, instance, label):
    """Gives (vote [n, 3], mask [n]): each point of an object of the 18 classes aims at its bounds' middle."""
    vote, mask = np.zeros((len(xyz), 3), np.float32), np.zeros(len(xyz), bool)
    for number in np.unique(instance):
        rows = np.where(instance == number)[0]
        if label[rows[0]] in IDS:
            middle = 0.5 * (xyz[rows].min(0) + xyz[rows].max(0))
            vote[rows], mask[rows] = middle - xyz[rows], True
    return vote, mask
