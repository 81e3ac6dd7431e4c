/**
 * A web server that takes disk images as uploads and gives them back: plain `node:http`, no framework. `node examples/upload/server.mjs FOLDER PORT QUOTA`.
 *
 * PUT /disks/NAME stores an upload in any format as qcow2, GET /disks lists what there is, GET /disks/NAME downloads a disk.
 */

import { createReadStream } from 'node:fs'
import { readdir, readFile, stat } from 'node:fs/promises'
import { createServer } from 'node:http'
import { join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { pathToFileURL } from 'node:url'
import { ingest } from 'qcow2'

const GIB = 2 ** 30
const PAGE = new URL('./page.html', import.meta.url)

/** What an upload is refused with, by the code of its error; 422 for an image that is wrong. */
const STATUS = { EEXIST: 409, ERR_QCOW2_LIMIT: 413, ERR_QCOW2_FORMAT_UNKNOWN: 415, ENOSPC: 507 }

/**
 * @param {object} options
 * @param {string} options.folder where the disks are
 * @param {number} [options.quota] bytes of all disks together
 * @param {number} [options.maxVirtualSize] bytes of the largest disk that may be claimed
 */
export function uploadServer({ folder, quota = 100 * GIB, maxVirtualSize = 1024 * GIB }) {
  /** What uploads under way may still need. */
  let reserved = 0

  async function take(request, name) {
    const length = request.headers['content-length']
    const byteLength = length === undefined ? undefined : Number(length)
    const free = quota - (await used(folder)) - reserved
    const expected = byteLength ?? Math.max(free, 0)
    if (expected > free) throw Object.assign(new Error('there is no room for it'), { code: 'ERR_QCOW2_LIMIT' })
    reserved += expected
    try {
      return await ingest(request, join(folder, name), {
        to: 'qcow2',
        byteLength,
        maxBytes: Math.max(free, 0),
        limits: { maxVirtualSize, maxMetadataBytes: 64 << 20, maxSnapshots: 16, maxBitmaps: 16 },
        maxSpool: Math.max(free, 16 << 20),
        // So that a request that is refused can be answered.
        keepInput: true,
      })
    } finally {
      reserved -= expected
    }
  }

  async function upload(request, response, name) {
    try {
      const { virtualSize, inspection, spooled } = await take(request, name)
      send(response, 201, { name, virtualSize, format: inspection.detected ?? inspection.format, spooled })
    } catch (error) {
      // Nobody is there to be answered when the connection is gone: `ingest` has left nothing.
      if (request.destroyed && !request.complete) return
      send(response, STATUS[error.code] ?? (error.code === undefined ? 500 : 422), {
        code: error.code,
        message: error.message,
      })
      await abandon(request)
    }
  }

  return createServer((request, response) => {
    handle(request, response).catch(error => {
      if (response.headersSent) response.destroy(error)
      else send(response, error.code === 'ENOENT' ? 404 : 500, { code: error.code, message: error.message })
    })
  })

  async function handle(request, response) {
    const { pathname } = new URL(request.url ?? '/', 'http://localhost')
    const name = /^\/disks\/([\w-][\w.-]*)$/.exec(pathname)?.[1]
    if (name !== undefined && request.method === 'PUT') return await upload(request, response, name)
    if (request.method !== 'GET') return send(response, 405, { message: 'GET, or PUT /disks/NAME' })
    if (pathname === '/') return response.setHeader('content-type', 'text/html').end(await readFile(PAGE))
    if (pathname === '/disks') return send(response, 200, await list(folder))
    if (name === undefined) return send(response, 404, { message: 'no such page' })
    const { size } = await stat(join(folder, name))
    response.setHeader('content-disposition', `attachment; filename="${name}"`)
    response.setHeader('content-length', size)
    await pipeline(createReadStream(join(folder, name)), response)
  }
}

function send(response, status, body) {
  const text = `${JSON.stringify(body)}\n`
  const refused = status >= 400 && !response.req.complete
  response.writeHead(status, {
    'content-type': 'application/json',
    'content-length': Buffer.byteLength(text),
    ...(refused && { connection: 'close' }),
  })
  response.write(text)
  // Ending it closes a connection on which more comes: see `abandon`.
  if (!refused) response.end()
}

/** Lets a client that still sends read the answer; one that goes on is cut off. */
async function abandon(request) {
  request.resume()
  await new Promise(resolve => {
    request.once('close', resolve)
    setTimeout(resolve, 2000).unref()
  })
  request.destroy()
}

const list = async folder => {
  const names = await readdir(folder)
  return await Promise.all(names.map(async name => ({ name, size: (await stat(join(folder, name))).size })))
}

const used = async folder => (await list(folder)).reduce((sum, { size }) => sum + size, 0)

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const [, , folder = '.', port = '8080', quota] = process.argv
  const server = uploadServer({ folder, ...(quota && { quota: Number(quota) }) })
  server.listen(Number(port), 'localhost', () => {
    console.log(`http://localhost:${server.address().port}/ stores disks in ${folder}`)
  })
}
