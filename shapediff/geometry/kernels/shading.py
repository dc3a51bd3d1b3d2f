"""The loops of the ray-cast renderer, compiled by numba: what a ray met, which rays go to the lights, and what comes of them.

A *point* is what one ray of the camera met, in rows of `place` (n, 3), `normal` (n, 3) and `kind` (n,).
"""

from __future__ import annotations

import numpy as np
from numba import njit

NOTHING, SHAPE, GROUND = 0, 1, 2
TILE = 8
NUM_LIGHTS = 3
"""What is known of the light at a point, each 0 to 1: how much of the key light, the sky, and the ground it sees."""


@njit(cache=True, fastmath=True)
def corner_normals(vertices, faces, smooth_above):  # type: ignore[no-untyped-def]
    """(f, 3, 3) float32: at each corner, the mean normal of the faces there that meet this one at less than a crease.

    Faces count by their area. `smooth_above` is the cosine of the angle from which an edge is a crease.
    """
    num_faces = len(faces)
    flat = np.zeros((num_faces, 3), np.float32)
    area = np.zeros(num_faces, np.float32)
    starts = np.zeros(len(vertices) + 1, np.int64)
    for f in range(num_faces):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz, vx, vy, vz = b[0] - a[0], b[1] - a[1], b[2] - a[2], c[0] - a[0], c[1] - a[1], c[2] - a[2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        size = np.sqrt(nx * nx + ny * ny + nz * nz)
        if size > 0:
            flat[f, 0], flat[f, 1], flat[f, 2], area[f] = nx / size, ny / size, nz / size, size
        for k in range(3):
            starts[faces[f, k] + 1] += 1
    starts = np.cumsum(starts)
    filled = starts[:-1].copy()
    around = np.empty(3 * num_faces, np.int64)
    for f in range(num_faces):
        for k in range(3):
            around[filled[faces[f, k]]] = f
            filled[faces[f, k]] += 1
    normals = np.empty((num_faces, 3, 3), np.float32)
    for f in range(num_faces):
        for k in range(3):
            x = y = z = np.float32(0)
            for i in range(starts[faces[f, k]], starts[faces[f, k] + 1]):
                g = around[i]
                if flat[f, 0] * flat[g, 0] + flat[f, 1] * flat[g, 1] + flat[f, 2] * flat[g, 2] > smooth_above:
                    x, y, z = x + area[g] * flat[g, 0], y + area[g] * flat[g, 1], z + area[g] * flat[g, 2]
            size = np.sqrt(x * x + y * y + z * z)
            for d, value in enumerate((x, y, z)):
                normals[f, k, d] = value / size if size > 0 else flat[f, d]
    return normals


@njit(cache=True, fastmath=True)
def camera_rays(eye, right, up, back, centre, half, size, columns, rows):  # type: ignore[no-untyped-def]
    """(n, 6) float32: origin and direction through places of the picture given in pixels; the first pixel's centre is 0.5."""
    rays = np.empty((len(columns), 6), np.float32)
    for i in range(len(columns)):
        x = centre[0] + half * (2 * columns[i] / size - 1)
        y = centre[1] - half * (2 * rows[i] / size - 1)
        for d in range(3):
            rays[i, d] = eye[d]
            rays[i, 3 + d] = x * right[d] + y * up[d] - back[d]
    return rays


@njit(cache=True, fastmath=True)
def covered_tiles(eye, right, up, back, centre, half, size, vertices, faces):  # type: ignore[no-untyped-def]
    """(t, t) bool: the tiles of `TILE` pixels that the box of some triangle in the picture touches; no ray elsewhere hits."""
    side = size // TILE + 1
    tiles = np.zeros((side, side), np.bool_)
    place = np.empty((len(vertices), 2), np.float32)
    for v in range(len(vertices)):
        x = y = depth = np.float32(0)
        for d in range(3):
            offset = vertices[v, d] - eye[d]
            x, y, depth = x + offset * right[d], y + offset * up[d], depth - offset * back[d]
        place[v, 0] = ((x / depth - centre[0]) / half + 1) * size / 2
        place[v, 1] = ((centre[1] - y / depth) / half + 1) * size / 2
    low, high = np.empty(2, np.int64), np.empty(2, np.int64)
    for f in range(len(faces)):
        for d in range(2):
            a, b, c = place[faces[f, 0], d], place[faces[f, 1], d], place[faces[f, 2], d]
            low[d] = min(max(int((min(a, b, c) - 0.01) // TILE), 0), side - 1)
            high[d] = min(max(int((max(a, b, c) + 0.01) // TILE), 0), side - 1)
        for row in range(low[1], high[1] + 1):
            for column in range(low[0], high[0] + 1):
                tiles[row, column] = True
    return tiles


@njit(cache=True, fastmath=True)
def within_tiles(tiles, columns, rows):  # type: ignore[no-untyped-def]
    """The numbers of the places of the picture that lie in one of the tiles."""
    found = np.empty(len(columns), np.int64)
    count, last = 0, len(tiles) - 1
    for i in range(len(columns)):
        row, column = min(max(int(rows[i] // TILE), 0), last), min(max(int(columns[i] // TILE), 0), last)
        found[count] = i
        count += tiles[row, column]
    return found[:count]


@njit(cache=True, fastmath=True)
def _meets_box(x, y, z, dx, dy, dz, low, high):  # type: ignore[no-untyped-def]
    enter, leave = np.float32(0), np.float32(1e30)
    for d in range(3):
        # Scalars, here and below: a view of a row costs more than the arithmetic on it.
        at, along = (x, dx) if d == 0 else ((y, dy) if d == 1 else (z, dz))
        along = along if abs(along) > np.float32(1e-9) else np.float32(1e-9)
        scale = np.float32(1) / along
        one, other = (low[d] - at) * scale, (high[d] - at) * scale
        enter, leave = max(enter, min(one, other)), min(leave, max(one, other))
    return enter <= leave


@njit(cache=True, fastmath=True)
def resolve(rays, aimed, depth, face, uv, vertices, faces, normals, middle, floor, reach, size, columns, rows):  # type: ignore[no-untyped-def]
    """What each ray met: (place, normal towards the viewer, where rays to the lights start, kind, share of the shadow shown).

    `depth`, `face` and `uv` are those of the rays `aimed`, which are in order; `face` is past the last one where a ray met no
    triangle. From above it then meets the ground, at height `floor`, which shows less and less of its shadow away from the
    `middle` of the shape and towards the rim of the picture, and past twice `reach` none: there is nothing.
    Rays to the lights start on the smooth surface that the normals speak of (Hanika 2021, Hacking the Shadow Terminator):
    from the flat one, triangles would shade themselves where light grazes.
    """
    n = len(rays)
    place, normal = np.zeros((n, 3), np.float32), np.zeros((n, 3), np.float32)
    start, kind, share = np.zeros((n, 3), np.float32), np.zeros(n, np.uint8), np.zeros(n, np.float32)
    h = 0
    for i in range(n):
        f = len(faces)
        if h < len(aimed) and aimed[h] == i:
            f, h = face[h], h + 1
        if f >= len(faces):
            if rays[i, 4] < -1e-3:
                t = (floor - rays[i, 1]) / rays[i, 4]
                x, z = rays[i, 0] + t * rays[i, 3] - middle[0], rays[i, 2] + t * rays[i, 5] - middle[2]
                rim = min(columns[i], size - columns[i], rows[i], size - rows[i]) / (np.float32(0.1) * size)
                share[i] = _fade((np.float32(2.0) - np.sqrt(x * x + z * z) / reach) / np.float32(1.2)) * _fade(rim)
                if share[i] > 0:
                    for d in range(3):
                        place[i, d] = rays[i, d] + t * rays[i, 3 + d]
                        start[i, d] = place[i, d]
                    normal[i, 1] = 1
                    kind[i] = GROUND
            continue
        kind[i] = SHAPE
        u, v, t = uv[h - 1, 0], uv[h - 1, 1], depth[h - 1]
        weights = (np.float32(1) - u - v, u, v)
        # Faces may be inside out: the side that is seen is the outside. Only the flat triangle tells, for at an outline the
        # smooth normals look away.
        a, b, c = faces[f, 0], faces[f, 1], faces[f, 2]
        facing = length = np.float32(0)
        for d in range(3):
            e, g = (d + 1) % 3, (d + 2) % 3
            flat = (vertices[b, e] - vertices[a, e]) * (vertices[c, g] - vertices[a, g])
            flat -= (vertices[b, g] - vertices[a, g]) * (vertices[c, e] - vertices[a, e])
            facing += flat * rays[i, 3 + d]
        for d in range(3):
            place[i, d] = rays[i, d] + t * rays[i, 3 + d]
            for k in range(3):
                normal[i, d] += weights[k] * normals[f, k, d]
            length += normal[i, d] ** 2
        sign = np.float32(1) if facing <= 0 else np.float32(-1)
        scale = sign / np.sqrt(max(length, np.float32(1e-12)))
        for d in range(3):
            normal[i, d] *= scale
            start[i, d] = place[i, d]
        for k in range(3):
            below = np.float32(0)
            for d in range(3):
                below += sign * normals[f, k, d] * (place[i, d] - vertices[faces[f, k], d])
            if below < 0:
                for d in range(3):
                    start[i, d] -= weights[k] * below * sign * normals[f, k, d]
    return place, normal, start, kind, share


@njit(cache=True, fastmath=True)
def _fade(x):  # type: ignore[no-untyped-def]
    x = min(max(x, np.float32(0)), np.float32(1))
    return x * x * (3 - 2 * x)


@njit(cache=True)
def edges(picture, size, least):  # type: ignore[no-untyped-def]
    """Numbers of the pixels that differ by `least` of 255 from the one to the right or below, and of those."""
    found = np.zeros(size * size, np.bool_)
    for row in range(size):
        for column in range(size):
            i = row * size + column
            for j in (i + 1 if column + 1 < size else i, i + size if row + 1 < size else i):
                for d in range(3):
                    if abs(np.int64(picture[i, d]) - np.int64(picture[j, d])) >= least:
                        found[i] = found[j] = True
    return np.flatnonzero(found)


@njit(cache=True, fastmath=True)
def light_rays(start, normal, kind, side, low, high, lift, key, sky):  # type: ignore[no-untyped-def]
    """Rays to the lights from probes, a square of side * side points: (rays (m, 6), number of each (m,)).

    `key` (16, a, 3) are directions to the key light, `sky` (16, b, 3) cosine-weighted ones around (0, 0, 1): one row for each
    of 4 x 4 neighbours, which see the same light all together (interleaved sampling, Keller and Heidrich 2001). Ray k of
    probe p has number p * (a + b) + k. Left out are rays that leave the surface inwards or pass the box of the shape by.
    """
    num_key, num_rays = key.shape[1], key.shape[1] + sky.shape[1]
    rays = np.empty((len(kind) * num_rays, 6), np.float32)
    numbers = np.empty(len(rays), np.int64)
    count = 0
    for p in range(len(kind)):
        if kind[p] == NOTHING:
            continue
        cell = _cell(p, side)
        nx, ny, nz = normal[p, 0], normal[p, 1], normal[p, 2]
        for k in range(num_rays):
            if k < num_key:
                dx, dy, dz = key[cell, k, 0], key[cell, k, 1], key[cell, k, 2]
            else:
                dx, dy, dz = _around(nx, ny, nz, sky, cell, k - num_key)
            if dx * nx + dy * ny + dz * nz <= 0:
                continue
            x, y, z = start[p, 0], start[p, 1], start[p, 2]
            if not _meets_box(x, y, z, dx, dy, dz, low, high):
                continue
            rays[count, 0], rays[count, 1], rays[count, 2] = (
                x + lift * (nx + dx),
                y + lift * (ny + dy),
                z + lift * (nz + dz),
            )
            rays[count, 3], rays[count, 4], rays[count, 5] = dx, dy, dz
            numbers[count] = p * num_rays + k
            count += 1
    return rays[:count], numbers[:count]


@njit(cache=True, fastmath=True)
def gather_light(normal, kind, side, blocked, key, sky):  # type: ignore[no-untyped-def]
    """(side * side, NUM_LIGHTS) float32: what each probe sees, before `smooth_light`.

    `blocked` (probes * rays) are the rays of `light_rays` that met the shape. The share of the sky and of the ground that
    a cosine-weighted hemisphere sees is known, (1 + n_y) / 2 and the rest: only what blocks it is estimated.
    """
    num_key, num_sky = key.shape[1], sky.shape[1]
    light = np.zeros((len(kind), NUM_LIGHTS), np.float32)
    for p in range(len(kind)):
        if kind[p] == NOTHING:
            continue
        first, cell = p * (num_key + num_sky), _cell(p, side)
        for k in range(num_key):
            light[p, 0] += (not blocked[first + k]) / num_key
        light[p, 1], light[p, 2] = (1 + normal[p, 1]) / 2, (1 - normal[p, 1]) / 2
        for k in range(num_sky):
            if blocked[first + num_key + k]:
                up = _around(normal[p, 0], normal[p, 1], normal[p, 2], sky, cell, k)[1]
                light[p, 1 if up > 0 else 2] -= np.float32(1) / num_sky
    return light


@njit(cache=True, fastmath=True)
def _cell(p, side):  # type: ignore[no-untyped-def]
    return p // side % 4 * 4 + p % side % 4


@njit(cache=True, fastmath=True)
def _around(x, y, z, directions, cell, k):  # type: ignore[no-untyped-def]
    """A direction given around (0, 0, 1), around the normal (x, y, z) (Duff et al. 2017)."""
    sign = np.float32(1) if z >= 0 else np.float32(-1)
    a = np.float32(-1) / (sign + z)
    u, v, w = directions[cell, k, 0], directions[cell, k, 1], directions[cell, k, 2]
    return (
        u * (1 + sign * x * x * a) + v * x * y * a + w * x,
        u * sign * x * y * a + v * (sign + y * y * a) + w * y,
        w * z - u * sign * x - v * y,
    )


@njit(cache=True, fastmath=True)
def smooth_light(light, place, normal, kind, side, near):  # type: ignore[no-untyped-def]
    """`light` averaged over neighbours on the same surface, along rows and columns, at one probe's step and then at two.

    The weights 1 2 3 4 3 2 1 sum to the same over every fourth probe, so that the pattern of `light_rays` cancels.
    """
    for step in (side, 1, 2 * side, 2):
        smooth = np.zeros_like(light)
        for p in range(len(kind)):
            if kind[p] == NOTHING:
                continue
            total = key = sky = ground = np.float32(0)
            for k in range(-3, 4):
                q = p + k * step
                if q < 0 or q >= len(kind) or kind[q] != kind[p]:
                    continue
                # A row's end meets the next one's start, which lies elsewhere and so does not count.
                weight = np.float32(4 - abs(k)) * _likeness(place, normal, p, place, normal, q, near)
                total += weight
                key += weight * light[q, 0]
                sky += weight * light[q, 1]
                ground += weight * light[q, 2]
            smooth[p, 0], smooth[p, 1], smooth[p, 2] = key / total, sky / total, ground / total
        light = smooth
    return light


@njit(cache=True, fastmath=True)
def _likeness(place, normal, i, other_place, other_normal, j, near):  # type: ignore[no-untyped-def]
    """0 to 1: whether two points lie on one smooth surface."""
    bend = apart = np.float32(0)
    for d in range(3):
        bend += normal[i, d] * other_normal[j, d]
        apart += normal[i, d] * (other_place[j, d] - place[i, d])
    bend = max(bend, np.float32(0)) ** 2
    apart = apart / near
    return bend * bend * bend / (1 + apart * apart)


@njit(cache=True, fastmath=True)
def light_at(columns, rows, place, normal, kind, light, probe_place, probe_normal, probe_kind, side, near):  # type: ignore[no-untyped-def]
    """(n, NUM_LIGHTS) float32: the light of `smooth_light` at points anywhere in the picture."""
    found = np.zeros((len(kind), NUM_LIGHTS), np.float32)
    for i in range(len(kind)):
        if kind[i] == NOTHING:
            continue
        row, column = (rows[i] - np.float32(0.5)) / 2, (columns[i] - np.float32(0.5)) / 2
        first_row, first_column = int(np.floor(row)), int(np.floor(column))
        # Where none of four probes around is of this surface, as on things one pixel thin, those farther away must do.
        for reach in (0, 2, 8):
            total = key = sky = ground = np.float32(0)
            for y in range(max(first_row - reach, 0), min(first_row + reach + 2, side)):
                for x in range(max(first_column - reach, 0), min(first_column + reach + 2, side)):
                    q = y * side + x
                    if probe_kind[q] != kind[i]:
                        continue
                    across, along = abs(y - row), abs(x - column)
                    weight = _likeness(place, normal, i, probe_place, probe_normal, q, near * (1 + 4 * reach))
                    if reach == 0:
                        weight *= (np.float32(1.01) - across) * (np.float32(1.01) - along)
                    else:
                        weight = (weight + np.float32(1e-4)) / (1 + across * across + along * along)
                    total += weight
                    key += weight * light[q, 0]
                    sky += weight * light[q, 1]
                    ground += weight * light[q, 2]
            if total > (0.02 if reach == 0 else 0):
                found[i, 0], found[i, 1], found[i, 2] = key / total, sky / total, ground / total
                break
    return found


@njit(cache=True, fastmath=True)
def shade(light, normal, kind, share, rays, to_key, key, sky, ground, albedo, backdrop):  # type: ignore[no-untyped-def]
    """(n, 3) float32 linear light in [0, 1]: points as they look.

    `key`, `sky` and `ground` (3,) are the colours of the lights, `albedo` that of the shape, `backdrop` that of everything
    else; `share` (n,) says how much of its shadow the ground shows.
    """
    colours = np.empty((len(kind), 3), np.float32)
    for i in range(len(kind)):
        if kind[i] != SHAPE:
            # Only its shadow tells the ground from the backdrop; a shadow is bluer than what it falls on.
            shadow = np.float32(0)
            if kind[i] == GROUND:
                shadow = share[i] * (1 - np.float32(0.5) * light[i, 0] - np.float32(0.5) * light[i, 1])
            for d in range(3):
                colours[i, d] = backdrop[d] * (1 - shadow * (np.float32(0.92) - np.float32(0.05) * d))
            continue
        size = facing = lit = np.float32(0)
        for d in range(3):
            size += rays[i, 3 + d] ** 2
            facing -= normal[i, d] * rays[i, 3 + d]
            lit += normal[i, d] * to_key[d]
        lit = max(lit, np.float32(0)) * light[i, 0]
        # Light that grazes is reflected (Schlick 1994): a faint sheen towards the outline.
        sheen = (1 - min(max(facing / np.sqrt(size), np.float32(0)), np.float32(1))) ** 4 * np.float32(0.22)
        open_sky = max(light[i, 1], np.float32(0))
        for d in range(3):
            # Between bright walls shadows are lighter, and take the colour of the walls (Jimenez et al. 2016).
            shut = 1 - open_sky - max(light[i, 2], np.float32(0))
            between = max(shut, np.float32(0)) * albedo[d] * np.float32(0.45)
            around = (open_sky + between) * sky[d] + max(light[i, 2], np.float32(0)) * ground[d]
            value = albedo[d] * (lit * key[d] + around) + sheen * open_sky * sky[d]
            colours[i, d] = 1 - np.exp(-value * (1 + value * np.float32(0.35)))  # a soft shoulder: nothing burns out
    return colours
