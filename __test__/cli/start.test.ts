/** What a short command loads: a script that looks at many images pays it for each. */

import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { create } from 'qcow2'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { CLI } from './run.js'

let folder: string
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'qcow2-start-'))
  await (await create(join(folder, 'disk.qcow2'), { size: 2 ** 20 })).close()
  writeFileSync(
    join(folder, 'tell.cjs'),
    `process.on('exit', () => require('node:fs').writeFileSync('loaded', process.moduleLoadList.join('\\n')))`,
  )
})
afterAll(() => rmSync(folder, { recursive: true }))

test('a short command loads neither what starts programs nor a second way to files', () => {
  const run = spawnSync(process.execPath, ['--require', './tell.cjs', CLI, 'info', 'disk.qcow2'], {
    cwd: folder,
    encoding: 'utf8',
  })
  expect(run.stderr).toBe('')
  expect(run.stdout).toContain('file format: qcow2')
  const loaded = readFileSync(join(folder, 'loaded'), 'utf8').split('\n')
  expect(loaded).toContain('NativeModule internal/modules/cjs/loader')
  for (const name of ['child_process', 'fs/promises', 'readline', 'http', 'worker_threads', 'tls', 'crypto']) {
    expect(loaded).not.toContain(`NativeModule ${name}`)
  }
})
