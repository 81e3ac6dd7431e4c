/** The page: drop a file, see how far it is, cancel. It knows the bridge, and nothing else. */

import type { Bridge, Target } from '../bridge.js'

declare global {
  interface Window {
    readonly qcow2: Bridge
  }
}

const bridge = window.qcow2
const find = <E extends HTMLElement>(selector: string, within: ParentNode = document): E => {
  const found = within.querySelector<E>(selector)
  if (found === null) throw new Error(`the page has no ${selector}`)
  return found
}

const zone = find('#zone')
const list = find('#jobs')
const row = find<HTMLTemplateElement>('#row')
const target = find<HTMLSelectElement>('#to')
const compress = find<HTMLInputElement>('#compress')
let last = 0

const mib = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`

async function convert(file: File): Promise<void> {
  const source = bridge.pathOf(file)
  const to = target.value as Target
  const chosen = await bridge.chooseTarget(source, to)
  if (chosen === undefined) return
  last += 1
  const id = last
  const item = find<HTMLElement>('li', row.content.cloneNode(true) as DocumentFragment)
  list.prepend(item)
  const bar = find<HTMLProgressElement>('progress', item)
  const state = find('.state', item)
  const cancel = find<HTMLButtonElement>('button', item)
  find('.name', item).textContent = file.name
  state.textContent = 'waiting'
  cancel.addEventListener('click', () => bridge.cancel(id))
  const outcome = await bridge.convert(id, { source, target: chosen, to, compress: compress.checked }, share => {
    bar.value = share
    state.textContent = `${Math.floor(100 * share)} %`
  })
  cancel.remove()
  if ('done' in outcome) {
    const { virtualSize, bytesWritten, durationMs } = outcome.done
    bar.value = 1
    item.dataset['state'] = 'done'
    state.textContent = `${mib(virtualSize)} disk, ${mib(bytesWritten)} written, ${(durationMs / 1000).toFixed(1)} s`
  } else {
    const { code, message } = outcome.failure
    item.dataset['state'] = code === 'ABORT_ERR' ? 'cancelled' : 'failed'
    state.textContent = code === 'ABORT_ERR' ? 'cancelled' : message
  }
}

zone.addEventListener('dragover', event => {
  event.preventDefault()
  zone.classList.add('over')
})
zone.addEventListener('dragleave', () => zone.classList.remove('over'))
zone.addEventListener('drop', event => {
  event.preventDefault()
  zone.classList.remove('over')
  for (const file of event.dataTransfer?.files ?? []) void convert(file)
})
find<HTMLInputElement>('#pick').addEventListener('change', ({ target: input }) => {
  for (const file of (input as HTMLInputElement).files ?? []) void convert(file)
})
