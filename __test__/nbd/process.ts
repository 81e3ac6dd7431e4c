/** A server in a process of its own, which goes down with it. */

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { library } from '../lifecycle/child.js'

/** Serves a raw disk on a socket, with more options as the text of a program; resolves when it listens. */
export async function serverProcess(file: string, path: string, options = ''): Promise<ChildProcess> {
  const program = `
    const { open, serveNbd } = require(${JSON.stringify(library)})
    open(${JSON.stringify(file)}, { format: 'raw', flags: 'r+' })
      .then(image => serveNbd(image, { path: ${JSON.stringify(path)}, ${options} }))
      .then(() => console.log('listens'))`
  const child = spawn(process.execPath, ['-e', program], { stdio: ['ignore', 'pipe', 'inherit'] })
  const [said] = (await once(child.stdout, 'data')) as [Buffer]
  if (said.toString() !== 'listens\n') throw new Error(`the server says ${said}`)
  return child
}

/** As a power cut takes it: nothing is said, and its socket stays. */
export async function kill(child: ChildProcess): Promise<void> {
  const gone = once(child, 'exit')
  child.kill('SIGKILL')
  await gone
}
