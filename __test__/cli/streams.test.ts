/** What goes to one pipe by two streams keeps its order; a reader who is slow or has seen enough is no error. */

import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { create, inspect } from 'qcow2'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { CLI } from './run.js'

const folder = mkdtempSync(join(tmpdir(), 'qcow2-streams-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const shell = (script: string): { code: number | null; stdout: string; stderr: string } => {
  const env = { ...process.env, Q: `"${process.execPath}" "${CLI}"` }
  const { status, stdout, stderr } = spawnSync('bash', ['-c', script], { cwd: folder, encoding: 'utf8', env })
  return { code: status, stdout, stderr }
}

const SCATTERED = 6000

beforeAll(async () => {
  const path = join(folder, 'many.qcow2')
  {
    await using image = await create(path, { size: 2 * SCATTERED * 512, clusterSize: 512 })
    const sector = new Uint8Array(512).fill(1)
    for (let i = 0; i < SCATTERED; i++) await image.write(sector, { position: 2 * i * 512 })
  }
  // Thousands of leaks: the first L2 tables lose their references.
  const bytes = readFileSync(path)
  const l1 = Number(bytes.readBigUInt64BE(40))
  bytes.fill(0, l1, l1 + 8 * 150)
  writeFileSync(join(folder, 'leaks.qcow2'), bytes)
  expect((await inspect(path)).safe).toBe(true)
})

it.runIf(process.platform !== 'win32')('a summary comes behind all that was found', () => {
  const { stdout } = shell('eval $Q check leaks.qcow2 2>&1 | { sleep 1; cat; }')
  const lines = stdout.split('\n')
  const summary = lines.findIndex(line => line.endsWith('leaked clusters were found on the image.'))
  expect(summary).toBeGreaterThan(3000)
  const torn = lines
    .slice(0, summary)
    .filter(line => line !== '' && !/^Leaked cluster \d+ refcount=1 reference=0$/.test(line))
  expect(torn).toEqual([])
})

it.runIf(process.platform !== 'win32')('a slow reader of a listing costs no listeners', () => {
  const { stdout, stderr } = shell(
    'set -o pipefail; eval $Q map --output=json many.qcow2 | { for i in $(seq 1 40); do head -c 20000 > /dev/null; sleep 0.02; done; cat > /dev/null; }; echo $PIPESTATUS',
  )
  expect({ stdout, stderr }).toEqual({ stdout: '0\n', stderr: '' })
})

it.runIf(process.platform !== 'win32')('a reader who has seen enough ends the output quietly', () => {
  for (const command of ['map --output=json many.qcow2', 'map many.qcow2', 'check leaks.qcow2', '--help']) {
    const { stdout, stderr } = shell(
      `eval $Q ${command} | head -1 > /dev/null; echo \${PIPESTATUS[0]} > code; cat code`,
    )
    expect([command, ['0\n', '3\n'].includes(stdout)]).toEqual([command, true])
    expect(stderr.includes('roken') || stderr.includes('EPIPE') || stderr.includes('Warning')).toBe(false)
  }
})
