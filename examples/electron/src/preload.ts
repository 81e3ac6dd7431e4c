/** The preload script: all that the page gets. It is sandboxed, and has neither Node nor the library. */

import { contextBridge, ipcRenderer, webUtils } from 'electron'
import type { Bridge } from './bridge.js'

const watching = new Map<number, (share: number) => void>()
ipcRenderer.on('progress', (_, id: number, share: number) => watching.get(id)?.(share))

const bridge: Bridge = {
  pathOf: file => webUtils.getPathForFile(file),
  chooseTarget: (source, to) => ipcRenderer.invoke('choose-target', source, to),
  convert: async (id, request, onProgress) => {
    watching.set(id, onProgress)
    try {
      return await ipcRenderer.invoke('convert', id, request)
    } finally {
      watching.delete(id)
    }
  },
  cancel: id => ipcRenderer.send('cancel', id),
}

contextBridge.exposeInMainWorld('qcow2', bridge)
