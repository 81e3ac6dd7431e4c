/** BullMQ, which is there where somebody installed it. */

import { createRequire } from 'node:module'
import type * as BullMq from 'bullmq'
import { Qcow2Error } from '../errors.js'

export type Queues = typeof BullMq

const INSTALL = 'npm install bullmq ioredis'

/** Loads BullMQ and what it reaches Redis by, or says what is to be installed. */
export function loadBullMq(): Queues {
  // A call of `require`, and no `import()`: BullMQ's ES modules do not find the client that they connect by.
  const queues = found('bullmq', () => require('bullmq') as Queues)
  found('ioredis', () => createRequire(require.resolve('bullmq')).resolve('ioredis'))
  return queues
}

function found<T>(name: string, load: () => T): T {
  try {
    return load()
  } catch (error) {
    const missing = error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND'
    const reason = missing ? 'it is not installed' : `it cannot be loaded: ${String(error)}`
    const message = `qcow2/jobs needs the package ${name}: ${reason}. ${INSTALL} brings it, beside qcow2`
    throw new Qcow2Error('ERR_QCOW2_PEER_MISSING', message, { field: name, cause: error })
  }
}
