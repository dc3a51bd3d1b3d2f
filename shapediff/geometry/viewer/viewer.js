// The viewer of shapediff's pages: WebGL2 by hand, no library, no request to anywhere.
// One context draws every shape (browsers allow about sixteen) and each picture is copied to the canvas of its figure.
"use strict";
(() => {
const YAW = 35, PITCH = 22, DISTANCE = 5, SHADOW_SIZE = 1024, CREASE = Math.cos(35 * Math.PI / 180);
const shapes = JSON.parse(document.getElementById("shapes").textContent);

// ---- meshes: quantised to 16 bits, differences of neighbours, bytes of one significance together, deflated, base64

async function unpack(shape) {
  const packed = Uint8Array.from(atob(shape.data), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const columns = (at, count, width) => {  // three columns of `count` whole numbers
    const rows = new Uint32Array(3 * count), mask = width === 2 ? 0xffff : 0xffffffff;
    for (let c = 0; c < 3; c++) for (let i = 0, value = 0; i < count; i++) {
      let step = 0;
      for (let b = 0; b < width; b++) step |= bytes[at + (b * 3 + c) * count + i] << (8 * b);
      value = (value + step) & mask;
      rows[3 * i + c] = value;
    }
    return rows;
  };
  const grid = columns(0, shape.vertices, 2), faces = columns(6 * shape.vertices, shape.faces, 4);
  const vertices = Float64Array.from(grid, (value, i) => shape.low[i % 3] + shape.step[i % 3] * value);
  return { vertices, faces };
}

// Each corner's position and normal: the mean of the faces there that meet this one at less than a crease.
function corners({ vertices, faces }) {
  const count = faces.length / 3, flat = new Float64Array(3 * count), area = new Float64Array(count);
  const around = Array.from({ length: vertices.length / 3 }, () => []);
  for (let f = 0; f < count; f++) {
    const [a, b, c] = [0, 1, 2].map((k) => 3 * faces[3 * f + k]);
    const u = [0, 1, 2].map((d) => vertices[b + d] - vertices[a + d]), v = [0, 1, 2].map((d) => vertices[c + d] - vertices[a + d]);
    const n = cross(u, v);
    area[f] = Math.hypot(...n) || 1e-30;
    for (let d = 0; d < 3; d++) { flat[3 * f + d] = n[d] / area[f]; around[faces[3 * f + d]].push(f); }
  }
  const out = new Float32Array(18 * count);
  for (let f = 0; f < count; f++) for (let k = 0; k < 3; k++) {
    const vertex = faces[3 * f + k], sum = [0, 0, 0];
    for (const g of around[vertex]) {
      const bend = flat[3 * f] * flat[3 * g] + flat[3 * f + 1] * flat[3 * g + 1] + flat[3 * f + 2] * flat[3 * g + 2];
      if (bend > CREASE) for (let d = 0; d < 3; d++) sum[d] += area[g] * flat[3 * g + d];
    }
    const length = Math.hypot(...sum) || 1;
    for (let d = 0; d < 3; d++) { out[6 * (3 * f + k) + d] = vertices[3 * vertex + d]; out[6 * (3 * f + k) + 3 + d] = sum[d] / length; }
  }
  return out;
}

// ---- downloads, made here from what is shown

function objText({ vertices, faces }) {
  const lines = [];
  for (let i = 0; i < vertices.length; i += 3) lines.push(`v ${vertices[i]} ${vertices[i + 1]} ${vertices[i + 2]}`);
  for (let i = 0; i < faces.length; i += 3) lines.push(`f ${faces[i] + 1} ${faces[i + 1] + 1} ${faces[i + 2] + 1}`);
  return lines.join("\n") + "\n";
}

function stlBytes({ vertices, faces }) {
  const view = new DataView(new ArrayBuffer(84 + 50 * faces.length / 3));
  view.setUint32(80, faces.length / 3, true);
  for (let f = 0; f < faces.length / 3; f++) {
    const p = [0, 1, 2].map((k) => [0, 1, 2].map((d) => vertices[3 * faces[3 * f + k] + d]));
    const n = cross(p[1].map((x, d) => x - p[0][d]), p[2].map((x, d) => x - p[0][d])), size = Math.hypot(...n) || 1;
    [n.map((x) => x / size), ...p].flat().forEach((x, i) => view.setFloat32(84 + 50 * f + 4 * i, x, true));
  }
  return view.buffer;
}

async function download(i, suffix) {
  const mesh = await unpack(shapes[i]);
  const blob = new Blob([suffix === "obj" ? objText(mesh) : stlBytes(mesh)], { type: "application/octet-stream" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = figures[i].dataset.name.replace(/[^\p{L}\p{N}_.-]+/gu, "_").replace(/^\.+/, "").slice(0, 100) + "." + suffix;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// ---- small matrices, by columns as GL has them

const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

function axes(yaw, pitch) {
  const a = yaw * Math.PI / 180, e = pitch * Math.PI / 180;
  const back = [Math.sin(a) * Math.cos(e), Math.sin(e), Math.cos(a) * Math.cos(e)], right = [Math.cos(a), 0, -Math.sin(a)];
  return { right, up: cross(back, right), back };
}

// From places to clip space, depths from near to far; without perspective, as the lamp sees them.
function view({ right, up, back }, eye, scaleX, scaleY, near, far, perspective) {
  const row = (axis, s) => [s * axis[0], s * axis[1], s * axis[2], -s * dot(axis, eye)];
  const depth = row(back, -1), x = row(right, scaleX), y = row(up, scaleY);
  const z = perspective
    ? depth.map((v, i) => (far + near) / (far - near) * v - (i === 3 ? 2 * far * near / (far - near) : 0))
    : depth.map((v, i) => 2 / (far - near) * v - (i === 3 ? (far + near) / (far - near) : 0));
  const w = perspective ? depth : [0, 0, 0, 1];
  return new Float32Array([0, 1, 2, 3].flatMap((i) => [x[i], y[i], z[i], w[i]]));
}

// ---- the one GL context

const VERTEX = `#version 300 es
uniform mat4 camera, lamp;
in vec3 place, normal;
out vec3 where, facing; out vec4 shadowed;
void main() { where = place; facing = normal; shadowed = lamp * vec4(place, 1.0); gl_Position = camera * vec4(place, 1.0); }`;

// The lights, colours and the soft shoulder are those of shapediff/geometry/raycast.py.
const FRAGMENT = `#version 300 es
precision highp float;
precision highp sampler2DShadow;
uniform vec3 colour, eye, toKey, middle;
uniform float reach, softness, isGround;
uniform vec2 size;
uniform sampler2DShadow shadow;
in vec3 where, facing; in vec4 shadowed;
out vec4 pixel;
float lit(vec3 n) {
  vec3 s = shadowed.xyz * 0.5 + 0.5;
  float sum = 0.0, spin = fract(52.9829189 * fract(dot(gl_FragCoord.xy, vec2(0.06711056, 0.00583715)))) * 6.2831853;
  float bias = 0.004 + 0.010 * (1.0 - clamp(dot(n, toKey), 0.0, 1.0));
  for (int i = 0; i < 24; i++) {
    float r = sqrt((float(i) + 0.5) / 24.0) * softness, a = float(i) * 2.39996323 + spin;
    sum += texture(shadow, vec3(s.xy + r * vec2(cos(a), sin(a)), s.z - bias - r * 0.6));
  }
  return sum / 24.0;
}
vec3 encoded(vec3 c) { return mix(12.92 * c, 1.055 * pow(c, vec3(1.0 / 2.4)) - 0.055, step(0.0031308, c)); }
void main() {
  vec3 seen = normalize(eye - where), n = normalize(facing);
  if (isGround > 0.5) {
    float away = length(where.xz - middle.xz) / reach;
    float share = (1.0 - lit(vec3(0.0, 1.0, 0.0))) * (1.0 - smoothstep(1.0, 2.0, away)) * step(where.y, eye.y);
    vec2 rim = min(gl_FragCoord.xy, size - gl_FragCoord.xy) / (0.1 * min(size.x, size.y));
    pixel = vec4(0.05, 0.07, 0.12, 1.0) * share * 0.34 * smoothstep(0.0, 1.0, min(rim.x, rim.y));
    return;
  }
  if (dot(n, seen) < 0.0 && !gl_FrontFacing) n = -n;
  float key = max(dot(n, toKey), 0.0) * lit(n), upper = 0.5 + 0.5 * n.y;
  float sheen = pow(1.0 - clamp(dot(n, seen), 0.0, 1.0), 4.0) * 0.22;
  vec3 around = upper * vec3(0.86, 0.93, 1.0) * 0.95 + (1.0 - upper) * vec3(1.0, 0.97, 0.93) * 0.42;
  // Corners that look down or inwards see less of the sky; height stands in for what a ray would tell.
  around *= mix(0.72, 1.0, smoothstep(-reach, 0.3 * reach, where.y - middle.y));
  vec3 value = colour * (key * vec3(1.0, 0.95, 0.88) * 1.15 + around) + sheen * upper * vec3(0.82, 0.88, 0.95);
  pixel = vec4(encoded(1.0 - exp(-value * (1.0 + 0.35 * value))), 1.0);
}`;
const DEPTH_ONLY = `#version 300 es
precision mediump float;
void main() {}`;

const surface = document.createElement("canvas");
const gl = surface.getContext("webgl2", { antialias: true, alpha: true, premultipliedAlpha: true });
let painter, caster, shadowMap, shadowFrame, loaded = new Map();

function program(vertex, fragment) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.bindAttribLocation(made, 0, "place");
  gl.bindAttribLocation(made, 1, "normal");
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS) && !gl.isContextLost()) throw new Error(gl.getProgramInfoLog(made));
  const at = {};
  for (let i = 0; i < gl.getProgramParameter(made, gl.ACTIVE_UNIFORMS); i++) {
    const name = gl.getActiveUniform(made, i).name;
    at[name] = gl.getUniformLocation(made, name);
  }
  return { made, at };
}

function setUp() {
  loaded = new Map();
  painter = program(VERTEX, FRAGMENT);
  caster = program(VERTEX, DEPTH_ONLY);
  shadowMap = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, shadowMap);
  gl.texStorage2D(gl.TEXTURE_2D, 1, gl.DEPTH_COMPONENT24, SHADOW_SIZE, SHADOW_SIZE);
  for (const [key, value] of [[gl.TEXTURE_COMPARE_MODE, gl.COMPARE_REF_TO_TEXTURE], [gl.TEXTURE_COMPARE_FUNC, gl.LEQUAL],
    [gl.TEXTURE_MIN_FILTER, gl.LINEAR], [gl.TEXTURE_MAG_FILTER, gl.LINEAR],
    [gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE], [gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE]]) gl.texParameteri(gl.TEXTURE_2D, key, value);
  shadowFrame = gl.createFramebuffer();
  gl.bindFramebuffer(gl.FRAMEBUFFER, shadowFrame);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.DEPTH_ATTACHMENT, gl.TEXTURE_2D, shadowMap, 0);
  gl.drawBuffers([gl.NONE]);
  gl.enable(gl.DEPTH_TEST);
}

function upload(values) {
  const array = gl.createVertexArray(), buffer = gl.createBuffer();
  gl.bindVertexArray(array);
  gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
  for (const i of [0, 1]) { gl.enableVertexAttribArray(i); gl.vertexAttribPointer(i, 3, gl.FLOAT, false, 24, 12 * i); }
  return { array, buffer, count: values.length / 6 };
}

function load(i) {  // geometry on the card, for figures near the window only
  if (loaded.has(i)) return loaded.get(i);
  const { low, step } = shapes[i], middle = low.map((x, d) => x + 65535 / 2 * step[d]);
  const entry = { middle, reach: 1, mesh: null };
  loaded.set(i, entry);
  unpack(shapes[i]).then((mesh) => {
    if (loaded.get(i) !== entry || gl.isContextLost()) return;
    const { vertices } = mesh;
    let reach = 0;
    for (let v = 0; v < vertices.length; v += 3) reach = Math.max(reach, Math.hypot(...middle.map((x, d) => vertices[v + d] - x)));
    entry.reach = reach = reach || 1;
    entry.mesh = upload(corners(mesh));
    const [x, y, z, r] = [middle[0], low[1] - 0.002 * reach, middle[2], 2.1 * reach], up = [0, 1, 0];
    const quad = [[-r, -r], [-r, r], [r, r], [-r, -r], [r, r], [r, -r]];
    entry.ground = upload(new Float32Array(quad.flatMap(([a, b]) => [x + a, y, z + b, ...up])));
    redraw(i);
  });
  return entry;
}

function unload(i) {
  const entry = loaded.get(i);
  loaded.delete(i);
  for (const part of [entry?.mesh, entry?.ground]) if (part) { gl.deleteBuffer(part.buffer); gl.deleteVertexArray(part.array); }
  canvases[i].width = canvases[i].height = 1;
}

function draw(i) {
  const entry = load(i), canvas = canvases[i];
  if (!entry.mesh) return;
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  const width = Math.max(1, Math.round(canvas.clientWidth * scale)), height = Math.max(1, Math.round(canvas.clientHeight * scale));
  if (surface.width < width || surface.height < height) {
    surface.width = Math.max(surface.width, width);
    surface.height = Math.max(surface.height, height);
  }
  const { yaw, pitch, zoom } = poses[i], { middle, reach } = entry;
  const looking = axes(yaw, pitch), lamp = axes(yaw - 42, 50);
  const eye = middle.map((x, d) => x + DISTANCE * reach * looking.back[d]), sun = middle.map((x, d) => x + 4 * reach * lamp.back[d]);
  const scaled = zoom * DISTANCE / 1.06 * Math.min(width, height);
  const toClip = view(looking, eye, scaled / width, scaled / height, (DISTANCE - 3.2) * reach, (DISTANCE + 3.2) * reach, true);
  const toLamp = view(lamp, sun, 0.98 / reach, 0.98 / reach, 2.5 * reach, 7 * reach, false);

  gl.bindFramebuffer(gl.FRAMEBUFFER, shadowFrame);
  gl.viewport(0, 0, SHADOW_SIZE, SHADOW_SIZE);
  gl.clear(gl.DEPTH_BUFFER_BIT);
  gl.useProgram(caster.made);
  gl.uniformMatrix4fv(caster.at.camera, false, toLamp);
  gl.bindVertexArray(entry.mesh.array);
  gl.drawArrays(gl.TRIANGLES, 0, entry.mesh.count);

  gl.bindFramebuffer(gl.FRAMEBUFFER, null);
  gl.viewport(0, 0, width, height);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.useProgram(painter.made);
  gl.uniformMatrix4fv(painter.at.camera, false, toClip);
  gl.uniformMatrix4fv(painter.at.lamp, false, toLamp);
  gl.uniform3fv(painter.at.colour, shapes[i].colour);
  gl.uniform3fv(painter.at.eye, eye);
  gl.uniform3fv(painter.at.toKey, lamp.back);
  gl.uniform3fv(painter.at.middle, middle);
  gl.uniform1f(painter.at.reach, reach);
  gl.uniform2f(painter.at.size, width, height);
  gl.uniform1f(painter.at.softness, 0.012);
  gl.uniform1f(painter.at.isGround, 0);
  gl.drawArrays(gl.TRIANGLES, 0, entry.mesh.count);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.uniform1f(painter.at.isGround, 1);
  gl.uniform1f(painter.at.softness, 0.04);
  gl.bindVertexArray(entry.ground.array);
  gl.drawArrays(gl.TRIANGLES, 0, entry.ground.count);
  gl.disable(gl.BLEND);

  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const paper = canvas.getContext("2d");
  paper.clearRect(0, 0, width, height);
  paper.drawImage(surface, 0, surface.height - height, width, height, 0, 0, width, height);
  canvas.dataset.drawn = String(1 + Number(canvas.dataset.drawn || 0));
}

// ---- figures and what people do with them

const figures = [...document.querySelectorAll("figure")].sort((a, b) => a.dataset.number - b.dataset.number);
const canvases = figures.map((figure) => figure.querySelector("canvas"));
const poses = figures.map(() => ({ yaw: YAW, pitch: PITCH, zoom: 1 }));
const isNear = new Set(), waiting = new Set();
let isTurning = false, last = 0;

function redraw(i) {
  if (!isNear.has(i)) return;
  if (!waiting.size && !isTurning) requestAnimationFrame(frame);
  waiting.add(i);
}

function frame(now) {
  if (isTurning) for (const i of isNear) { poses[i].yaw += Math.min(now - last, 100) * 0.03; waiting.add(i); }
  last = now;
  const these = [...waiting];
  waiting.clear();
  if (!gl.isContextLost()) these.forEach(draw);
  if (isTurning) requestAnimationFrame(frame);
}

function move(i, yaw, pitch, zoom) {
  const pose = poses[i];
  pose.yaw += yaw;
  pose.pitch = Math.min(89, Math.max(-60, pose.pitch + pitch));
  pose.zoom = Math.min(8, Math.max(0.5, pose.zoom * zoom));
  redraw(i);
}

function reset(i) { poses[i] = { yaw: YAW, pitch: PITCH, zoom: 1 }; redraw(i); }

const KEYS = { ArrowLeft: [-10, 0, 1], ArrowRight: [10, 0, 1], ArrowUp: [0, 10, 1], ArrowDown: [0, -10, 1],
  "+": [0, 0, 1.15], "=": [0, 0, 1.15], "-": [0, 0, 1 / 1.15] };

function listen(canvas, i) {
  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, [event.clientX, event.clientY]); canvas.setPointerCapture(event.pointerId); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = [event.clientX, event.clientY];
    fingers.set(event.pointerId, now);
    if (fingers.size === 1) return move(i, -0.6 * (now[0] - before[0]), 0.6 * (now[1] - before[1]), 1);
    const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
    const apart = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]) || 1;
    move(i, 0, 0, apart(now) / apart(before));
  });
  canvas.addEventListener("wheel", (event) => {  // a page must scroll past shapes: the wheel zooms the one that was chosen
    if (document.activeElement !== canvas && !event.ctrlKey) return;
    event.preventDefault();
    move(i, 0, 0, Math.exp(-0.0015 * event.deltaY));
  }, { passive: false });
  canvas.addEventListener("dblclick", () => reset(i));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Home") reset(i);
    else if (KEYS[event.key]) move(i, ...KEYS[event.key]);
    else return;
    event.preventDefault();
  });
}

function start() {
  const near = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
    const i = canvases.indexOf(target);
    if (isIntersecting) { isNear.add(i); redraw(i); } else { isNear.delete(i); unload(i); }
  }), { rootMargin: "300px" });
  const sizes = new ResizeObserver((entries) => entries.forEach(({ target }) => redraw(canvases.indexOf(target))));
  setUp();
  canvases.forEach((canvas, i) => { listen(canvas, i); near.observe(canvas); sizes.observe(canvas); });
  surface.addEventListener("webglcontextlost", (event) => event.preventDefault());
  surface.addEventListener("webglcontextrestored", () => { setUp(); isNear.forEach(redraw); });
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button"), figure = event.target.closest("figure");
  if (!button) return;
  const { action } = button.dataset;
  if (action === "obj" || action === "stl") download(figures.indexOf(figure), action);
  if (action === "large") button.setAttribute("aria-pressed", String(figure.classList.toggle("large")));
  if (action === "theme") document.documentElement.classList.toggle("dark");
  if (action === "turn") {
    isTurning = !isTurning;
    button.setAttribute("aria-pressed", String(isTurning));
    if (isTurning) requestAnimationFrame(frame);
  }
});

if (window.matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.classList.add("dark");
const warning = document.getElementById("warning");
if (gl && typeof DecompressionStream === "function") start();
else warning.textContent = "This browser cannot draw the shapes: it has no WebGL2, or is older than 2023. Downloads may still work.";
})();
