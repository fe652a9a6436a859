"use strict"
const find = id => document.getElementById(id)
const data = JSON.parse(find("data").textContent), map = find("map"), dots = [...find("dots").children]
const places = dots.map(dot => ["cx", "cy"].map(name => +dot.getAttribute(name)))
const picked = new Set()
let current = -1

const shown = i => !picked.size || picked.has(data.labels[i])
const className = i => data.classes.length ? data.classes[data.labels[i]] : ""

function make(tag, text, ...children) {
  const made = document.createElement(tag)
  made.append(text, ...children)
  return made
}

function thumb(i) {
  const made = make("span", "")
  made.className = "thumb"
  made.setAttribute("role", "img")
  made.setAttribute("aria-label", [className(i), data.keys[i]].filter(Boolean).join(" "))
  made.style.setProperty("--x", i % data.columns)
  made.style.setProperty("--y", Math.floor(i / data.columns))
  return made
}

function choose(i) {
  if (i === undefined || i === current) return
  current = i
  const [x, y] = places[i], ring = find("ring")
  ring.setAttribute("cx", x)
  ring.setAttribute("cy", y)
  ring.style.visibility = "visible"
  find("links").setAttribute("d", data.nearest[i].map(j => `M${x} ${y}L${places[j]}`).join(""))
  const near = make("div", "")
  for (const j of data.nearest[i]) near.append(make("figure", thumb(j), make("div", className(j))))
  find("panel").replaceChildren(thumb(i), make("p", make("b", className(i)), " ", make("small", data.keys[i])),
    make("p", make("small", "nearest")), near)
}

function least(cost) {
  let best, lowest = Infinity
  places.forEach((place, i) => {
    const value = shown(i) ? cost(place, i) : Infinity
    if (value < lowest) [best, lowest] = [i, value]
  })
  return best
}

function point(event) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse())
  choose(least(([x, y]) => { const d = Math.hypot(x - at.x, y - at.y); return d < 30 ? d : Infinity }))
}
map.addEventListener("pointermove", point)
map.addEventListener("pointerdown", point)

const first = () => least((_, i) => i)
map.addEventListener("focus", () => { if (current < 0) choose(first()) })
map.addEventListener("keydown", event => {
  const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key]
  const turn = {PageDown: 1, PageUp: -1}[event.key]
  if (!way && !turn) return
  event.preventDefault()
  if (current < 0) return choose(first())
  if (turn) return choose(least((_, i) => (i - current) * turn > 0 ? (i - current) * turn : Infinity))
  choose(least(([x, y]) => {
    const [dx, dy] = [x - places[current][0], y - places[current][1]]
    const along = dx * way[0] + dy * way[1], aside = Math.abs(dx * way[1]) + Math.abs(dy * way[0])
    return along > 0 && along >= aside ? along + aside : Infinity
  }))
})

find("legend")?.childNodes.forEach((button, label) => button.addEventListener("click", () => {
  if (!picked.delete(label)) picked.add(label)
  button.setAttribute("aria-pressed", picked.has(label))
  dots.forEach((dot, i) => dot.classList.toggle("off", !shown(i)))
}))
