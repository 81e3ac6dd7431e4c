/** The main process: the window, the utility process, and who may ask for what. */

import { join, parse } from 'node:path'
import { app, BrowserWindow, dialog, ipcMain, type UtilityProcess, utilityProcess, type WebContents } from 'electron'
import type { FromJobs, Outcome, Request, Target, ToJobs } from './bridge.js'

const pages = new Map<
  number,
  { readonly page: WebContents; readonly id: number; readonly end: (outcome: Outcome) => void }
>()
let jobs: UtilityProcess | undefined
let last = 0

/** Started with the first job, and again with the next one after it ended. */
function jobsProcess(): UtilityProcess {
  if (jobs !== undefined) return jobs
  const started = utilityProcess.fork(join(__dirname, 'jobs-process.js'), [], { serviceName: 'disk images' })
  started.on('message', (message: FromJobs) => {
    const asked = pages.get(message.id)
    if (asked === undefined) return
    if ('outcome' in message) {
      pages.delete(message.id)
      asked.end(message.outcome)
    } else if (!asked.page.isDestroyed()) {
      asked.page.send('progress', asked.id, message.progress)
    }
  })
  started.on('exit', code => {
    jobs = undefined
    for (const { end } of pages.values()) {
      end({ failure: { code: 'ENDED', message: `the process of the jobs ended with ${code}` } })
    }
    pages.clear()
  })
  jobs = started
  return started
}

const send = (message: ToJobs): void => jobsProcess().postMessage(message)

ipcMain.handle('convert', ({ sender }, id: number, start: Request) => {
  last += 1
  const number = last
  return new Promise<Outcome>(end => {
    pages.set(number, { page: sender, id, end })
    send({ id: number, start })
  })
})

ipcMain.on('cancel', ({ sender }, id: number) => {
  for (const [number, asked] of pages) if (asked.page === sender && asked.id === id) send({ id: number, cancel: true })
})

ipcMain.handle('choose-target', async (_, source: string, to: Target) => {
  const { dir, name } = parse(source)
  const { filePath } = await dialog.showSaveDialog({ defaultPath: join(dir, `${name}.${to}`) })
  return filePath || undefined
})

void app.whenReady().then(() => {
  const window = new BrowserWindow({
    width: 720,
    height: 560,
    webPreferences: { preload: join(__dirname, 'preload.js'), contextIsolation: true, sandbox: true },
  })
  // A page that goes takes its jobs with it.
  window.webContents.on('destroyed', () => jobs?.kill())
  void window.loadFile(join(__dirname, 'index.html'))
})
app.on('window-all-closed', () => app.quit())
