/**
 * What runs in the page of a report: the map to zoom into. Plain text, since it is neither compiled nor run here. `data` is set before it: the runs of
 * the disk, the names and colours of kinds.
 */
export const REPORT_SCRIPT = `
const canvas = document.getElementById('map')
const tip = document.getElementById('tip')
const ROWS = 32
const total = data.runs.reduce((sum, run) => sum + run[0], 0)
const ends = []
data.runs.reduce((at, run) => (ends.push(at + run[0]), at + run[0]), 0)
let from = 0, to = total
const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB']
const size = bytes => {
  let unit = 0
  while (bytes >= 1024 && unit < 6) { bytes /= 1024; unit++ }
  return (bytes < 10 && bytes % 1 ? bytes.toFixed(2) : bytes < 100 && bytes % 1 ? bytes.toFixed(1) : Math.round(bytes)) + ' ' + units[unit]
}
// The run that has a byte: the first one that ends behind it.
const find = at => {
  let low = 0, high = ends.length - 1
  while (low < high) { const middle = (low + high) >> 1; if (ends[middle] > at) high = middle; else low = middle + 1 }
  return low
}
const dark = matchMedia('(prefers-color-scheme: dark)')
function draw() {
  const ratio = devicePixelRatio || 1
  const width = canvas.width = Math.round(canvas.clientWidth * ratio)
  const height = canvas.height = Math.round(canvas.clientHeight * ratio)
  const context = canvas.getContext('2d')
  const colors = dark.matches ? data.dark : data.light
  const row = (to - from) / ROWS, tall = height / ROWS
  for (let y = 0; y < ROWS && total > 0; y++) {
    const begin = from + y * row
    // What is stored is drawn last: it is seen, however short it is.
    for (const stored of [false, true]) {
      for (let index = find(begin); index < ends.length; index++) {
        const [length, kind] = data.runs[index]
        const start = ends[index] - length
        if (start >= begin + row) break
        if (stored !== kind < data.stored) continue
        const left = Math.max(0, (start - begin) / row * width), right = Math.min(width, (ends[index] - begin) / row * width)
        context.fillStyle = colors[kind]
        context.fillRect(left, Math.round(y * tall), Math.max(right - left, stored ? ratio : 0), Math.ceil(tall) - ratio)
      }
    }
  }
  document.getElementById('range').textContent = size(from) + ' to ' + size(to) + ', a row is ' + size(row)
  document.getElementById('out').disabled = document.getElementById('all').disabled = to - from >= total
}
function show(begin, length) {
  length = Math.min(total, Math.max(length, Math.min(total, ROWS * 512)))
  from = Math.min(Math.max(0, begin), total - length)
  to = from + length
  draw()
}
const zoom = (factor, at) => show(at - (at - from) * factor, (to - from) * factor)
const place = event => {
  const box = canvas.getBoundingClientRect()
  const y = Math.min(ROWS - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * ROWS)))
  const x = Math.min(.999999, Math.max(0, (event.clientX - box.left) / box.width))
  return from + (y + x) * (to - from) / ROWS
}
canvas.addEventListener('wheel', event => { event.preventDefault(); zoom(event.deltaY < 0 ? .5 : 2, place(event)) }, { passive: false })
canvas.addEventListener('dblclick', event => zoom(.25, place(event)))
canvas.addEventListener('pointermove', event => {
  if (total === 0) return
  const index = find(place(event)), [length, kind, offset] = data.runs[index], start = ends[index] - length
  tip.textContent = size(start) + ' to ' + size(ends[index]) + ': ' + data.labels[kind] + (offset < 0 ? '' : ', at ' + offset + ' in the file')
})
canvas.addEventListener('pointerleave', () => { tip.textContent = '' })
canvas.addEventListener('keydown', event => {
  const step = (to - from) / ROWS
  const keys = { ArrowUp: () => show(from - step, to - from), ArrowDown: () => show(from + step, to - from),
    PageUp: () => show(2 * from - to, to - from), PageDown: () => show(to, to - from), Home: () => show(0, to - from),
    End: () => show(total, to - from), '+': () => zoom(.5, (from + to) / 2), '-': () => zoom(2, (from + to) / 2), 0: () => show(0, total) }
  if (!keys[event.key]) return
  event.preventDefault()
  keys[event.key]()
})
document.getElementById('in').onclick = () => zoom(.5, (from + to) / 2)
document.getElementById('out').onclick = () => zoom(2, (from + to) / 2)
document.getElementById('all').onclick = () => show(0, total)
dark.addEventListener('change', draw)
addEventListener('resize', draw)
draw()
`
